"""Symmetric integers: q = round(clamp(w / scale, −limit, limit))."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.ops import blocks
from entrenar.ops.symmetric import dequantize_symmetric, quantize_symmetric

COUNTS = st.integers(0, 400) | st.sampled_from([1, 63, 64, 65, 127, 128, 129])
LIMITS = st.sampled_from([7, 127])


def sample(count: int, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights, and a positive scale for each block."""
    generator = torch.Generator().manual_seed(seed)
    number = -(-count // block_size)
    return torch.randn(count, generator=generator), torch.rand(number, generator=generator) * 0.3 + 1e-3


def spread(scales: Tensor, block_size: int, count: int) -> Tensor:
    """The scale of every element."""
    return scales.repeat_interleave(block_size)[:count]


@given(count=COUNTS, block_size=st.sampled_from([16, 64]), limit=LIMITS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_codes_are_the_formula_in_numpy(count: int, block_size: int, limit: int, seed: int) -> None:
    flat, scales = sample(count, block_size, seed)
    with patch.object(blocks, "CHUNK_ELEMENTS", 128):
        codes = quantize_symmetric(flat, scales, limit, block_size)
    expected = np.rint(np.clip(flat.numpy() / spread(scales, block_size, count).numpy(), -limit, limit))
    assert codes.dtype == torch.int8
    assert codes.tolist() == expected.tolist()


@given(count=COUNTS, block_size=st.sampled_from([16, 64]), limit=LIMITS, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_are_code_times_scale(count: int, block_size: int, limit: int, seed: int) -> None:
    flat, scales = sample(count, block_size, seed)
    codes = quantize_symmetric(flat, scales, limit, block_size)
    each = spread(scales, block_size, count).numpy()
    with patch.object(blocks, "CHUNK_ELEMENTS", 128):
        single, double = (dequantize_symmetric(codes, scales, block_size, t) for t in (torch.float32, torch.float64))
    assert np.array_equal(single.numpy(), codes.numpy().astype(np.float32) * each)
    assert np.array_equal(double.numpy(), codes.numpy().astype(np.float64) * each.astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_one_rounding_of_the_float32_product(dtype: torch.dtype) -> None:
    flat, scales = sample(150, 64, 0)
    codes = quantize_symmetric(flat, scales, 127, 64)
    found = dequantize_symmetric(codes, scales, 64, dtype)
    assert torch.equal(found, dequantize_symmetric(codes, scales, 64, torch.float32).to(dtype))


def test_halves_round_to_even() -> None:
    codes = quantize_symmetric(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5]), torch.ones(1), 7, 16)
    assert codes.tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("count", [64, 70])
def test_a_block_of_scale_zero_gives_zeros(count: int) -> None:
    codes = quantize_symmetric(torch.zeros(count), torch.zeros(-(-count // 64)), 7, 64)
    assert codes.tolist() == [0] * count
    assert dequantize_symmetric(codes, torch.zeros(-(-count // 64)), 64, torch.float32).tolist() == [0.0] * count


def test_a_tensor_of_several_chunks_is_the_sum_of_its_parts() -> None:
    count = blocks.CHUNK_ELEMENTS + 3 * 64 + 5
    flat, scales = sample(count, 64, 0)
    codes = quantize_symmetric(flat, scales, 127, 64)
    restored = dequantize_symmetric(codes, scales, 64, torch.float32)
    each = spread(scales, 64, count)
    inside = flat.abs() <= 127 * each
    assert ((restored - flat).abs()[inside] <= each[inside] * 0.50001).all()
    assert torch.equal(restored[~inside], (flat.sign() * 127 * each)[~inside])
