"""Symmetric integers: q = round(clamp(w / scale, −limit, limit))."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.ops import blocks
from entrenar.ops.codebook.nibbles import unpack_nibbles
from entrenar.ops.symmetric.dequantize import dequantize_int8
from entrenar.ops.symmetric.quantize import quantize_symmetric

pytestmark = pytest.mark.usefixtures("kernel_path")
COUNTS = st.integers(0, 400) | st.sampled_from([1, 63, 64, 65, 127, 128, 129])
LIMITS = st.sampled_from([7, 127])


def sample(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def signed(codes: Tensor, limit: int, count: int) -> Tensor:
    """The codes as integers, one an element."""
    if limit == 127:
        return codes.view(torch.int8).int()
    nibbles = unpack_nibbles(codes, count).int()
    return nibbles - 16 * (nibbles > 7)


def spread(scales: Tensor, block_size: int, count: int) -> Tensor:
    """The scale of every element."""
    return scales.repeat_interleave(block_size)[:count]


@given(count=COUNTS, block_size=st.sampled_from([16, 64]), limit=LIMITS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_codes_are_the_formula_in_numpy(count: int, block_size: int, limit: int, seed: int) -> None:
    flat = sample(count, seed)
    with patch.object(blocks, "CHUNK_ELEMENTS", 128):
        codes, scales = quantize_symmetric(flat, limit, block_size)
    largest = [block.abs().max().item() for block in flat.split(block_size)] if count else []
    assert np.array_equal(scales.numpy(), np.array(largest, dtype=np.float32) / np.float32(limit))
    expected = np.rint(np.clip(flat.numpy() / spread(scales, block_size, count).numpy(), -limit, limit))
    assert codes.dtype == torch.uint8
    assert signed(codes, limit, count).tolist() == expected.tolist()


@given(count=COUNTS, block_size=st.sampled_from([16, 64]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_are_code_times_scale(count: int, block_size: int, seed: int) -> None:
    codes, scales = quantize_symmetric(sample(count, seed), 127, block_size)
    each, integers = spread(scales, block_size, count).numpy(), codes.numpy().view(np.int8)
    with patch.object(blocks, "CHUNK_ELEMENTS", 128):
        single, double = (dequantize_int8(codes, [scales], block_size, t) for t in (torch.float32, torch.float64))
    assert np.array_equal(single.numpy(), integers.astype(np.float32) * each)
    assert np.array_equal(double.numpy(), integers.astype(np.float64) * each.astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_one_rounding_of_the_float32_product(dtype: torch.dtype) -> None:
    codes, scales = quantize_symmetric(sample(150), 127, 64)
    found = dequantize_int8(codes, [scales], 64, dtype)
    assert torch.equal(found, dequantize_int8(codes, [scales], 64, torch.float32).to(dtype))


def test_halves_round_to_even() -> None:
    codes, scales = quantize_symmetric(torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]), 7, 16)
    assert scales.tolist() == [1.0]
    assert signed(codes, 7, 7).tolist() == [7, 0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("limit", [7, 127])
@pytest.mark.parametrize("count", [64, 70])
def test_a_block_of_zeros_gives_zeros(count: int, limit: int) -> None:
    codes, scales = quantize_symmetric(torch.zeros(count), limit, 64)
    assert signed(codes, limit, count).tolist() == [0] * count
    assert not scales.any()


def test_a_tensor_of_several_chunks_is_within_half_a_scale_everywhere() -> None:
    count = blocks.CHUNK_ELEMENTS + 3 * 64 + 5
    flat = sample(count)
    codes, scales = quantize_symmetric(flat, 127, 64)
    restored = dequantize_int8(codes, [scales], 64, torch.float32)
    assert ((restored - flat).abs() <= spread(scales, 64, count) * 0.50001).all()
