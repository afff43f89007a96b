"""Exact order statistics of magnitudes over a tensor that is read in pieces, without a sort.

A sample of a large tensor says within which bounds the wanted magnitude must lie. One pass counts what is above them
and gathers the few in between, among which it is then found. Where it lies elsewhere after all, or too many do, two
counting passes over the whole tensor find it: the sample decides the time, never the result.
"""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from entrenar.merging.stack import Piece, Stack
from entrenar.ops.merge.masks import (
    LOWER_BINS,
    UPPER_BINS,
    count_magnitudes,
    magnitude_bits,
    magnitudes_between,
)

Pair = tuple[Tensor, Tensor | None]
Bits = NDArray[numpy.int32]
Found = TypeVar("Found")
Series = Callable[[Piece], Sequence[Pair]]
"""One (x, base) a series; magnitudes are those of x − base."""

# How far from the wanted rank the bounds lie, as a share of the elements: so many standard errors, which come from how
# the sample's pieces differ, since neighbours resemble each other.
ERRORS, LEAST_MARGIN, MOST_MARGIN = 4.0, 0.005, 0.04
ROOM = 8  # one in so many elements may lie between the bounds


@dataclass(frozen=True)
class Threshold:
    """The k largest magnitudes: those above `bits` (of a float32), and the first `ties` of those equal to it."""

    bits: int
    ties: int

    @property
    def value(self) -> float:
        """The k-th largest magnitude."""
        return struct.unpack("<f", struct.pack("<I", self.bits))[0]


_NOTHING = Threshold(0x7FFFFFFF, 0)


def largest(stack: Stack, series: Series, counts: Sequence[Sequence[int]]) -> list[list[Threshold]]:
    """The thresholds of the k largest magnitudes.

    Args:
        counts: per series, the k wanted of it; each at most the number of elements.
    """
    sampled = _near(stack, series, counts)
    return _counted(lambda: map(series, stack.pieces()), counts) if sampled is None else sampled


@dataclass(frozen=True)
class _Bounds:
    """The magnitudes from `first` to `last`: those between are gathered, those above counted."""

    first: int
    last: int
    gathered: Tensor  # (room,) int32
    counts: Tensor  # (2,) int64: how many above, how many between

    def threshold(self, k: int) -> Threshold | None:
        """Of the k largest, if it lies here and there was room for everything here."""
        above, inside = self.counts.tolist()
        if not above < k <= above + inside or inside > len(self.gathered):
            return None
        gathered = self.gathered[:inside].numpy()
        bits = _largest_of(gathered, k - above)
        return Threshold(bits, k - above - int((gathered > bits).sum()))


def _near(stack: Stack, series: Series, counts: Sequence[Sequence[int]]) -> list[list[Threshold]] | None:
    """By one pass; None where there is no sample, it says too little, or it led astray."""
    samples = _samples(stack, series)
    bounds = [
        [_bounds(stack, (place, k), sample, k) for k in wanted]
        for place, (sample, wanted) in enumerate(zip(samples, counts, strict=False))
    ]
    known = _all_of(bounds, counts)
    if known is None:
        return None
    for piece in stack.pieces():
        for several, pair in zip(known, series(piece), strict=True):
            for one in several:
                magnitudes_between(*pair, one.first, one.last, one.gathered, one.counts)
    thresholds = [
        [_NOTHING if k <= 0 else one.threshold(k) for one, k in zip(several, wanted, strict=True)]
        for several, wanted in zip(known, counts, strict=True)
    ]
    return _all_of(thresholds, counts)


def _all_of(thresholds: list[list[Found | None]], counts: Sequence[Sequence[int]]) -> list[list[Found]] | None:
    """As it is, if there is one for every count."""
    known = [[one for one in several if one is not None] for several in thresholds]
    return known if list(map(len, known)) == list(map(len, counts)) else None


def _samples(stack: Stack, series: Series) -> list[Bits]:
    """Of every series (pieces, elements) magnitudes; none of a small tensor."""
    pieces = [[magnitude_bits(*pair).numpy() for pair in series(piece)] for piece in stack.sample()]
    return [numpy.stack(bits) for bits in zip(*pieces, strict=True)]


def _bounds(stack: Stack, role: tuple[int, int], sample: Bits, k: int) -> _Bounds | None:
    """Around the magnitude that k elements reach; None where the sample's pieces differ too much to say."""
    share, size = k / stack.numel, sample.size
    above = (sample >= _largest_of(sample, round(share * size))).mean(axis=1)
    margin = max(ERRORS * float(above.std()) / len(above) ** 0.5, LEAST_MARGIN)
    if margin > MOST_MARGIN:
        return None
    first, last = (_largest_of(sample, round((share + side) * size)) for side in (margin, -margin))
    # Beyond the sample's ends there may be anything.
    first, last = first if share + margin < 1 else 0, last if share > margin else 0x7FFFFFFF
    room = stack.scratch.take(("between", *role), stack.numel // ROOM, torch.int32)
    return _Bounds(first, last, room, torch.zeros(2, dtype=torch.int64))


def _largest_of(bits: Bits, k: int) -> int:
    """The k-th largest, k from 1; the nearest there is."""
    place = bits.size - min(max(k, 1), bits.size)
    return int(numpy.partition(bits.reshape(-1), place)[place])


def _counted(passes: Callable[[], Iterable[Sequence[Pair]]], counts: Sequence[Sequence[int]]) -> list[list[Threshold]]:
    """By two passes of counting: by the upper bits, then by the lower ones of the bin that holds it."""
    upper = [torch.zeros(2, UPPER_BINS, dtype=torch.int64) for _ in counts]
    for pairs in passes():
        for table, (x, base) in zip(upper, pairs, strict=True):
            count_magnitudes(x, base, table)
    bins = [[_bin_of(table.sum(0), k) for k in wanted] for table, wanted in zip(upper, counts, strict=True)]
    lower = [{prefix: torch.zeros(2, LOWER_BINS, dtype=torch.int64) for prefix, _ in bin_places} for bin_places in bins]
    for pairs in passes():
        for tables, (x, base) in zip(lower, pairs, strict=True):
            for prefix, table in tables.items():
                count_magnitudes(x, base, table, prefix)
    return [
        [_threshold(tables[prefix].sum(0), prefix, left) for prefix, left in bin_places]
        for tables, bin_places in zip(lower, bins, strict=True)
    ]


def _bin_of(
    counts: Tensor,  # (bins,) int64
    k: int,
) -> tuple[int, int]:
    """The bin that holds the k-th largest, and which largest of that bin it is."""
    up_to = counts.cumsum(0)
    n = int(up_to[-1])
    place = min(int(torch.searchsorted(up_to, n - k, right=True)), len(counts) - 1)
    return place, k - (n - int(up_to[place]))


def _threshold(counts: Tensor, prefix: int, left: int) -> Threshold:
    if left <= 0:
        return _NOTHING
    lower, ties = _bin_of(counts, left)
    return Threshold(prefix << 16 | lower, ties)
