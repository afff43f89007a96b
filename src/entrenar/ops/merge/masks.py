"""Which elements of a task vector δ = x − base are kept: by magnitude, at random, or by rank; and exact thresholds.

Magnitudes are compared as the bits of |δ| in float32. A threshold is found by counting: first the upper 15 bits, then,
of the elements in the bin that holds it, the lower 16; no sort, whatever the size of the tensor. (Where a sample says
about where it lies, the few magnitudes around it are gathered instead.) Random numbers are a
function of (key, index) alone (two rounds of MurmurHash3's 32-bit finaliser, Appleby 2008): the same whatever the
order, the pieces or the threads. Native kernels and the reference give the same bits. Letters: n elements of a piece.
"""

import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.merge.operands import difference, dtype_code, is_native

UPPER_BINS, LOWER_BINS = 1 << 15, 1 << 16
_WORD = 0xFFFFFFFF
Key = tuple[int, int]

_histogram = native.Function("merge_histogram")
_between = native.Function("merge_between")
_keep_top = native.Function("merge_keep_top")
_keep_random = native.Function("merge_keep_random")
_non_finite = native.Function("merge_non_finite")
_keep_by_rank = native.Function("merge_keep_by_rank")


def magnitude_bits(
    x: Tensor,  # (n,) float
    base: Tensor | None,  # (n,)
) -> Tensor:
    """(n,) int32: the bits of |x − base| as float32; NaN is the largest."""
    return difference(x, base).float().contiguous().view(torch.int32) & 0x7FFFFFFF


def count_magnitudes(
    x: Tensor,  # (n,) float
    base: Tensor | None,  # (n,)
    counts: Tensor,  # (2, UPPER_BINS) or (2, LOWER_BINS) int64, added to; what counts is the sum of the two rows
    prefix: int | None = None,
) -> None:
    """Count elements by the upper bits of their magnitude; with a prefix those that have it, by the lower bits."""
    if is_native(x, base):
        upper = -1 if prefix is None else prefix
        _histogram(x, dtype_code(x), base, dtype_code(base), x.numel(), upper, counts)
        return
    bits = magnitude_bits(x, base)
    values = bits >> 16 if prefix is None else bits[bits >> 16 == prefix] & 0xFFFF
    counts[0] += torch.bincount(values, minlength=counts.shape[1])


def magnitudes_between(
    x: Tensor,  # (n,) float
    base: Tensor | None,  # (n,)
    first: int,
    last: int,
    out: Tensor,  # (room,) int32, filled from tally[1] on
    tally: Tensor,  # (2,) int64, added to: how many magnitudes are above `last`, and how many from `first` to `last`
) -> None:
    """Gather the bits of the magnitudes from `first` to `last`, as far as there is room, and count all of those."""
    if is_native(x, base):
        _between(x, dtype_code(x), base, dtype_code(base), x.numel(), first, last, out, tally)
        return
    bits = magnitude_bits(x, base)
    inside = bits[(bits >= first) & (bits <= last)]
    place = out[int(tally[1]) :][: len(inside)]
    place.copy_(inside[: len(place)])
    tally += torch.stack([(bits > last).sum(), torch.tensor(len(inside))])


def count_non_finite(
    x: Tensor,  # (n,) float
) -> int:
    """How many elements are infinite or NaN."""
    if is_native(x):
        count = torch.zeros(1, dtype=torch.int64)
        _non_finite(x, dtype_code(x), x.numel(), count)
        return int(count)
    return int((~x.isfinite()).sum())


def keep_top(
    x: Tensor,  # (n,) float
    base: Tensor | None,  # (n,)
    threshold: int,
    ties: Tensor,  # (1,) int64: how many of those at the threshold are still wanted; lowered by those found
    mask: Tensor,  # (n,) uint8
    *,
    outside: bool = False,
) -> None:
    """mask = whether an element is above the threshold (bits), or at it and among the first ones wanted.

    Args:
        outside: clear the mask there, and leave it as it is elsewhere.
    """
    if is_native(x, base):
        _keep_top(x, dtype_code(x), base, dtype_code(base), x.numel(), threshold, ties, int(outside), mask)
        return
    bits = magnitude_bits(x, base)
    equal = bits == threshold
    first = equal & (equal.cumsum(0) <= ties)
    ties -= first.sum()
    top = (bits > threshold) | first
    if outside:
        mask[top] = 0
    else:
        mask.copy_(top)


def keep_random(
    key: Key,
    start: int,
    probability: float,
    mask: Tensor,  # (n,) uint8
) -> None:
    """mask = Bernoulli(probability) at the indices from `start`."""
    limit = -int(-probability * 2**32 // 1)  # u < p · 2³² is u < its ceiling
    if native.available():
        _keep_random(*key, start, mask.numel(), limit, mask)
        return
    mask.copy_(random_words(key, start, mask.numel()) < limit)


def keep_by_rank(
    x: Tensor,  # (n,) float, whole rows of `columns`
    base: Tensor | None,  # (n,)
    columns: int,
    low: float,
    high: float,
    key: Key,
    start: int,
    mask: Tensor,  # (n,) uint8
) -> None:
    """mask = Bernoulli(p), p rising evenly from `low` at a row's smallest |δ| to `high` at its largest (DELLA)."""
    if is_native(x, base):
        ends = torch.tensor([low, high], dtype=torch.float64)
        rows = x.numel() // columns
        _keep_by_rank(x, dtype_code(x), base, dtype_code(base), rows, columns, ends, *key, start, mask)
        return
    bits = magnitude_bits(x, base).view(-1, columns)
    ranks = bits.sort(dim=1, stable=True).indices.argsort(dim=1)
    likely = low + (high - low) * (ranks.double() / max(columns - 1, 1))
    mask.copy_(random_words(key, start, x.numel()) < likely.view(-1) * 4294967296.0)


def random_words(key: Key, start: int, count: int) -> Tensor:
    """(count,) int64 in [0, 2³²): the random numbers at the indices from `start`."""
    index = torch.arange(start, start + count)
    return _mixed((_mixed((index & _WORD) ^ key[0]) + key[1] + (index >> 32) * 0x9E3779B9) & _WORD)


def _mixed(value: Tensor) -> Tensor:
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _WORD
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _WORD
    return value ^ (value >> 16)
