"""Exact order statistics of magnitudes over a tensor that is read in pieces: two counting passes, no sort."""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.ops.merge_masks import LOWER_BINS, UPPER_BINS, count_magnitudes

Pair = tuple[Tensor, Tensor | None]
Pass = Callable[[], Iterable[Sequence[Pair]]]
"""One pass: for every piece, one (x, base) a series; magnitudes are those of x − base."""


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


def largest(passes: Pass, counts: Sequence[Sequence[int]]) -> list[list[Threshold]]:
    """The thresholds of the k largest magnitudes.

    Args:
        passes: called twice.
        counts: per series, the k wanted of it; each at most the number of elements.
    """
    upper = [torch.zeros(2, UPPER_BINS, dtype=torch.int64) for _ in counts]
    for pairs in passes():
        for table, (x, base) in zip(upper, pairs, strict=True):
            count_magnitudes(x, base, table)
    bins = [[_bin_of(table.sum(0), k) for k in wanted] for table, wanted in zip(upper, counts, strict=True)]
    lower = [{prefix: torch.zeros(2, LOWER_BINS, dtype=torch.int64) for prefix, _ in found} for found in bins]
    for pairs in passes():
        for tables, (x, base) in zip(lower, pairs, strict=True):
            for prefix, table in tables.items():
                count_magnitudes(x, base, table, prefix)
    return [
        [_threshold(tables[prefix].sum(0), prefix, left) for prefix, left in found]
        for tables, found in zip(lower, bins, strict=True)
    ]


def _bin_of(
    counts: Tensor,  # (bins,) int64
    k: int,
) -> tuple[int, int]:
    """The bin that holds the k-th largest, and which largest of that bin it is."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, k))
    place = min(place, len(counts) - 1)
    return len(counts) - 1 - place, k - int(above[place] - counts.flip(0)[place])


def _threshold(counts: Tensor, prefix: int, left: int) -> Threshold:
    if left <= 0:
        return _NOTHING
    lower, ties = _bin_of(counts, left)
    return Threshold(prefix << 16 | lower, ties)
