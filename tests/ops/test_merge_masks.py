"""Masks and counts of the merge methods: the same bits on every path, whatever the pieces."""

import numpy as np
import pytest
import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.merge.masks import (
    LOWER_BINS,
    UPPER_BINS,
    count_magnitudes,
    count_non_finite,
    keep_by_rank,
    keep_random,
    keep_top,
    magnitude_bits,
    magnitudes_between,
    random_words,
)

KEY = (0x12345678, 0x9ABCDEF0)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_count = pytest.mark.parametrize("count", [1, 7, 255, 256, 257, 1000])


def pair(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and base of two dtypes, with equal magnitudes, zeros and infinities."""
    generator = torch.Generator().manual_seed(count)
    base = (torch.randn(count, generator=generator) * 4).round()
    x = base + (torch.randn(count, generator=generator) * 2).round()
    x[::17], base[::17] = torch.inf, 0
    return x.to(dtype), base.to(torch.bfloat16)


@every_dtype
@every_count
def test_magnitudes_are_counted_by_their_bits(kernel_path: str, dtype: torch.dtype, count: int) -> None:
    x, base = pair(count, dtype)
    bits = magnitude_bits(x, base)
    upper, lower = torch.zeros(2, UPPER_BINS, dtype=torch.int64), torch.zeros(2, LOWER_BINS, dtype=torch.int64)
    count_magnitudes(x, base, upper)
    assert torch.equal(upper.sum(0), torch.bincount(bits >> 16, minlength=UPPER_BINS))
    prefix = int(bits[0] >> 16)
    count_magnitudes(x, base, lower, prefix)
    assert torch.equal(lower.sum(0), torch.bincount(bits[bits >> 16 == prefix] & 0xFFFF, minlength=LOWER_BINS))


@every_dtype
@every_count
@pytest.mark.parametrize("room", [0, 5, 2000])
def test_magnitudes_between_are_gathered_as_far_as_there_is_room(
    kernel_path: str, dtype: torch.dtype, count: int, room: int
) -> None:
    x, base = pair(count, dtype)
    bits = magnitude_bits(x, base)
    first, last = sorted(int(bits[place]) for place in (count // 3, count // 2))
    inside = bits[(bits >= first) & (bits <= last)]
    out, found = torch.full((room + 8,), -7, dtype=torch.int32), torch.tensor([100, 2])
    magnitudes_between(x, base, first, last, out[: room + 2], found)
    assert found.tolist() == [100 + int((bits > last).sum()), 2 + len(inside)]
    written = min(len(inside), room)
    assert torch.equal(out[2 : 2 + written], inside[:written])
    assert (out[2 + written :] == -7).all()
    assert (out[:2] == -7).all()


def test_every_magnitude_is_between_the_ends(kernel_path: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -torch.inf, torch.nan, 1.0])
    out, found = torch.empty(6, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    magnitudes_between(x, None, 0, 0x7FFFFFFF, out, found)
    assert found.tolist() == [0, 6]
    assert torch.equal(out, magnitude_bits(x, None))


@every_dtype
@every_count
@pytest.mark.parametrize("wanted", [0, 1, 3, 10_000])
def test_the_first_of_those_at_the_threshold_are_kept(
    kernel_path: str, dtype: torch.dtype, count: int, wanted: int
) -> None:
    x, base = pair(count, dtype)
    bits = magnitude_bits(x, base)
    threshold = int(bits[count // 2])
    equal = bits == threshold
    expected = (bits > threshold) | (equal & (equal.cumsum(0) <= wanted))
    mask, ties = torch.empty(count, dtype=torch.uint8), torch.tensor([wanted])
    keep_top(x, base, threshold, ties, mask)
    assert torch.equal(mask.bool(), expected)
    assert int(ties) == max(0, wanted - int(equal.sum()))
    rest = torch.ones(count, dtype=torch.uint8)
    keep_top(x, base, threshold, torch.tensor([wanted]), rest, outside=True)
    assert torch.equal(rest.bool(), ~expected)


def test_nothing_is_above_the_largest_threshold(kernel_path: str) -> None:
    mask = torch.empty(3, dtype=torch.uint8)
    keep_top(torch.tensor([1.0, torch.inf, torch.nan]), None, 0x7FFFFFFF, torch.tensor([0]), mask)
    assert mask.tolist() == [0, 0, 0]


def test_random_words_are_murmurs_finaliser_twice() -> None:
    def mixed(value: np.ndarray) -> np.ndarray:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            value = (value ^ (value >> np.uint32(shift))) * np.uint32(factor)
        return value ^ (value >> np.uint32(16))

    index = np.arange(5, 300, dtype=np.uint32)
    expected = mixed(mixed(index ^ np.uint32(KEY[0])) + np.uint32(KEY[1]))
    assert random_words(KEY, 5, 295).tolist() == expected.tolist()


@every_count
@pytest.mark.parametrize("start", [0, 12345, 2**32 - 100, 2**40 + 3])
def test_random_masks_do_not_depend_on_the_pieces(kernel_path: str, count: int, start: int) -> None:
    whole = torch.empty(count, dtype=torch.uint8)
    keep_random(KEY, start, 0.3, whole)
    assert torch.equal(whole.bool(), random_words(KEY, start, count) < -int(-0.3 * 2**32 // 1))
    cut = count // 3
    parts = [torch.empty(size, dtype=torch.uint8) for size in (cut, count - cut)]
    keep_random(KEY, start, 0.3, parts[0])
    keep_random(KEY, start + cut, 0.3, parts[1])
    assert torch.equal(torch.cat(parts), whole)


def test_random_words_are_even_and_independent_of_their_neighbours() -> None:
    words = random_words(KEY, 0, 1 << 20).double() / 2**32
    counts = torch.histc(words, 256, 0, 1)
    expected = words.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 350  # chi squared of 255 degrees: 3 in 100,000
    centred = words - 0.5
    for lag in (1, 2, 64, 4096):
        assert abs(float((centred[lag:] * centred[:-lag]).mean() * 12)) < 5 / 2**10
    other = random_words((KEY[0], KEY[1] + 1), 0, 1 << 20).double() / 2**32 - 0.5
    assert abs(float((centred * other).mean() * 12)) < 5 / 2**10


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_the_ends_of_probability(kernel_path: str, probability: float) -> None:
    mask = torch.empty(300, dtype=torch.uint8)
    keep_random(KEY, 0, probability, mask)
    assert mask.unique().tolist() == [probability]


@every_dtype
@pytest.mark.parametrize("columns", [1, 2, 9, 300])
def test_ranks_decide_how_likely_an_element_is_kept(kernel_path: str, dtype: torch.dtype, columns: int) -> None:
    rows = 5
    x, base = pair(rows * columns, dtype)
    order = np.argsort(magnitude_bits(x, base).view(rows, columns).numpy(), axis=1, kind="stable")
    ranks = np.argsort(order, axis=1)
    likely = 0.2 + (0.9 - 0.2) * (ranks / max(columns - 1, 1))
    expected = random_words(KEY, 70, rows * columns).numpy() < likely.ravel() * 2.0**32
    mask = torch.empty(rows * columns, dtype=torch.uint8)
    keep_by_rank(x, base, columns, 0.2, 0.9, KEY, 70, mask)
    assert mask.bool().tolist() == expected.tolist()


@every_dtype
@every_count
def test_what_is_not_finite_is_counted(kernel_path: str, dtype: torch.dtype, count: int) -> None:
    x, _ = pair(count, dtype)
    x[-1] = torch.nan
    assert count_non_finite(x) == int((~x.isfinite()).sum())


@pytest.mark.skipif(native.path() == "reference", reason="the native library is not built")
def test_a_buffer_that_is_too_small_is_refused() -> None:
    with pytest.raises(InputError, match="buffer is too small"):
        keep_top(torch.zeros(9), None, 1, torch.tensor([0]), torch.empty(8, dtype=torch.uint8))
    with pytest.raises(InputError, match="buffer is too small"):
        count_magnitudes(torch.zeros(9), None, torch.zeros(2, 5, dtype=torch.int64))
    out = torch.empty(9, dtype=torch.int32)
    with pytest.raises(InputError, match="buffer is too small"):
        magnitudes_between(torch.zeros(9), None, 0, 1, out, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(InputError, match="out of range"):
        magnitudes_between(torch.zeros(9), None, 2, 1, out, torch.zeros(2, dtype=torch.int64))
