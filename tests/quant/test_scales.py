"""How scales are held: as raw bytes, or in 8 bits with one float32 per 256."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.quant.scales import as_bytes, as_float, block_scales, nest_dynamic, nest_linear, plain

COUNTS = st.integers(0, 600) | st.sampled_from([1, 255, 256, 257, 511, 512, 513])
MAGNITUDES = st.sampled_from([1e-30, 1e-3, 1.0, 1e30])
# Half the widest gap of the dynamic map (0.9 / 64, in its highest decade) and a step of bitsandbytes' grid.
DYNAMIC_ERROR = 0.9 / 128 + 1 / 65535


def some_scales(count: int, seed: int, magnitude: float = 1.0) -> Tensor:
    """Positive float32 scales, spread over two decades."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).square() * magnitude


def group_largest(values: Tensor) -> Tensor:
    """For each value the largest magnitude in its group of 256."""
    largest = [part.abs().amax().expand(len(part)) for part in values.split(256) if len(part)]
    return torch.cat(largest) if largest else values


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3.4e38, math.inf, math.nan, 1 / 3])
def test_bytes_hold_a_float_to_the_last_bit(value: float) -> None:
    raw = as_bytes(torch.tensor([value, 1.0]))
    assert raw.dtype == torch.uint8
    assert raw.numpy().tobytes() == np.array([value, 1.0], dtype=np.float32).tobytes()
    assert as_bytes(as_float(raw)).tolist() == raw.tolist()


@given(COUNTS, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_plain_scales_come_back_exactly(count: int, seed: int) -> None:
    scales = some_scales(count, seed)
    parts = plain(scales)
    assert {name: part.numel() for name, part in parts.items()} == {"scales": 4 * count}
    assert torch.equal(block_scales(parts), scales)


@given(count=COUNTS, seed=st.integers(0, 99), magnitude=MAGNITUDES)
@settings(max_examples=60, deadline=None)
def test_linear_scales_are_within_half_a_255th_of_their_groups_maximum(count: int, seed: int, magnitude: float) -> None:
    scales = some_scales(count, seed, magnitude)
    error = (block_scales(nest_linear(scales)).double() - scales).abs()
    assert (error <= group_largest(scales) * (0.5 / 255 + 1e-6)).all()


@given(count=COUNTS, seed=st.integers(0, 99), magnitude=MAGNITUDES)
@settings(max_examples=60, deadline=None)
def test_dynamic_scales_are_within_half_a_step_of_the_map(count: int, seed: int, magnitude: float) -> None:
    scales = some_scales(count, seed, magnitude)
    centred = scales - scales.mean() if count else scales
    error = (block_scales(nest_dynamic(scales)).double() - scales).abs()
    rounding = magnitude * 2**-22
    assert (error <= group_largest(centred) * DYNAMIC_ERROR + rounding).all()


@given(COUNTS, st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_nested_scales_hold_one_byte_each_and_one_float_a_group_and_no_other_copy(count: int, seed: int) -> None:
    groups = -(-count // 256)
    linear, dynamic = nest_linear(some_scales(count, seed)), nest_dynamic(some_scales(count, seed))
    sizes = {"scales": count, "nested_scales": 4 * groups}
    assert {name: part.untyped_storage().nbytes() for name, part in linear.items()} == sizes
    assert {name: part.untyped_storage().nbytes() for name, part in dynamic.items()} == sizes | {"offset": 4}
    assert {part.dtype for part in (*linear.values(), *dynamic.values())} == {torch.uint8}


def test_linear_codes_are_the_formula() -> None:
    parts = nest_linear(torch.tensor([0.0, 1.0, 2.0, 255.0, 127.6, 0.4]))
    assert parts["scales"].tolist() == [0, 1, 2, 255, 128, 0]
    assert as_float(parts["nested_scales"]).tolist() == [255.0]


def test_the_offset_is_the_mean_of_all_scales_over_every_group() -> None:
    scales = torch.cat((torch.full((256,), 1.0), torch.full((256,), 4.0)))
    parts = nest_dynamic(scales)
    assert as_float(parts["offset"]).tolist() == [2.5]
    assert as_float(parts["nested_scales"]).tolist() == [1.5, 1.5]


@pytest.mark.parametrize("value", [0.0, 0.37])
@pytest.mark.parametrize("count", [1, 256, 300])
def test_equal_scales_come_back_exactly(value: float, count: int) -> None:
    scales = torch.full((count,), value)
    assert torch.equal(block_scales(nest_linear(scales)), scales)
    assert torch.allclose(block_scales(nest_dynamic(scales)), scales, rtol=1e-6, atol=0)
