"""Blocks over a flat tensor: whole ones in chunks, then at most one partial."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.ops import blocks
from entrenar.ops.blocks import block_absmax, block_count, chunks

COUNTS = st.integers(0, 700) | st.sampled_from([1, 63, 64, 65, 127, 128, 129])
BLOCK_SIZES = st.sampled_from([1, 5, 16, 64, 256])


@given(COUNTS, BLOCK_SIZES)
@settings(max_examples=50, deadline=None)
def test_the_block_count_includes_the_partial_one(count: int, block_size: int) -> None:
    assert block_count(count, block_size) == math.ceil(count / block_size)


@given(count=COUNTS, block_size=BLOCK_SIZES, chunk=st.sampled_from([1, 64, 200, 1 << 19]))
@settings(max_examples=100, deadline=None)
def test_chunks_cover_every_whole_block_once_and_split_no_byte(count: int, block_size: int, chunk: int) -> None:
    with patch.object(blocks, "CHUNK_ELEMENTS", chunk):
        parts = list(chunks(count, block_size, torch.device("cpu")))
    covered = [index for part in parts for index in range(part.start, part.stop)]
    assert covered == list(range(count - count % block_size))
    assert all((part.stop - part.start) % block_size == 0 for part in parts)
    assert all(part.start % 2 == 0 for part in parts)


@given(count=COUNTS, block_size=BLOCK_SIZES, chunk=st.sampled_from([64, 1 << 19]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_absmax_is_the_largest_magnitude_of_each_block(count: int, block_size: int, chunk: int, seed: int) -> None:
    flat = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    with patch.object(blocks, "CHUNK_ELEMENTS", chunk):
        found = block_absmax(flat, block_size)
    values = flat.tolist()
    starts = range(0, count, block_size)
    assert found.tolist() == [max(abs(v) for v in values[start : start + block_size]) for start in starts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_absmax_is_float32_and_exact_for_every_input_dtype(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    flat = torch.tensor([info.min, 1.0, -info.smallest_normal, 0.0, -0.0, 3.0], dtype=dtype)
    found = block_absmax(flat, 2)
    assert found.dtype == torch.float32
    assert found.tolist() == [info.max, info.smallest_normal, 3.0]


@pytest.mark.parametrize("position", [0, 63, 64, 127, 128, 129])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_reaches_the_absmax_of_its_block_alone(position: int, odd: float) -> None:
    flat = torch.ones(130)
    flat[position] = odd
    finite = block_absmax(flat, 64).isfinite().tolist()
    assert finite == [block != position // 64 for block in range(3)]
