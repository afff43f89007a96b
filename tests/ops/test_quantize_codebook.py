"""Codebook quantization: the nearest entry of sixteen, in whatever order the codebook stands."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.ops import blocks
from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.codebook.nibbles import unpack_nibbles
from entrenar.ops.codebook.quantize import quantize_codebook

pytestmark = pytest.mark.usefixtures("kernel_path")
COUNTS = st.integers(1, 400) | st.sampled_from([1, 63, 64, 65, 127, 128, 129])
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EIGHTHS = torch.arange(-8, 8) / 8  # with 1 missing, so that every midpoint is exact


def shuffled_codebook(seed: int) -> Tensor:
    """16 values in [−1, 1] in no order, the ends among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(16, generator=generator) * 2 - 1
    values[:2] = torch.tensor([-1.0, 1.0])
    return values[torch.randperm(16, generator=generator)]


def spread(scales: Tensor, block_size: int, count: int) -> Tensor:
    return scales.repeat_interleave(block_size)[:count]


@given(count=COUNTS, block_size=st.sampled_from([16, 64]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_entry_is_nearer_than_the_chosen_one(count: int, block_size: int, seed: int) -> None:
    flat = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    codebook = shuffled_codebook(seed)
    with patch.object(blocks, "CHUNK_ELEMENTS", 128):
        packed, absmax = quantize_codebook(flat, codebook, block_size)
    distance = (flat / spread(absmax, block_size, count)).double()[:, None] - codebook.double()
    chosen = distance.abs().gather(1, unpack_nibbles(packed, count).long()[:, None])
    assert packed.shape == (-(-count // 2),)
    assert (chosen[:, 0] <= distance.abs().amin(dim=1) + 1e-6).all()


@pytest.mark.parametrize("count", [16, 11])
def test_a_tie_goes_to_the_smaller_entry(count: int) -> None:
    """In a whole block and in a partial one."""
    flat = torch.cat((torch.tensor([-1.0]), (EIGHTHS[:-1] + EIGHTHS[1:]) / 2))[:count]
    packed, _ = quantize_codebook(flat, EIGHTHS, 16)
    chosen = EIGHTHS[unpack_nibbles(packed, count).long()]
    assert chosen.tolist() == [-1.0, *EIGHTHS.tolist()][:count]


@pytest.mark.parametrize("count", [64, 70, 1])
@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45, -1e-40])
def test_zeros_and_denormals_are_the_entry_zero(count: int, tiny: float) -> None:
    """The guard keeps 1 / absmax finite: 0 · ∞ would pick an arbitrary entry, which a nested scale makes a weight."""
    packed, _ = quantize_codebook(torch.full((count,), tiny), EIGHTHS, 64)
    assert EIGHTHS[unpack_nibbles(packed, count).long()].tolist() == [0.0] * count


@given(count=COUNTS, block_size=st.sampled_from([16, 64]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_are_the_entry_times_the_scale(count: int, block_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (-(-count // 2),), generator=generator, dtype=torch.uint8)
    scales = torch.rand(-(-count // block_size), generator=generator)
    codebook = shuffled_codebook(seed)
    entries = codebook[[int(digit, 16) for digit in packed.numpy().tobytes().hex()][:count]]
    each = spread(scales, block_size, count)
    with patch.object(blocks, "CHUNK_ELEMENTS", 128):
        found = {t: dequantize_codebook(packed, [scales], codebook, block_size, count, t) for t in DTYPES}
    assert torch.equal(found[torch.float64], entries.double() * each.double())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(found[dtype], (entries * each).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_quantize_as_their_float32_values(dtype: torch.dtype) -> None:
    flat = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    codebook = shuffled_codebook(0)
    for low, full in zip(
        quantize_codebook(flat, codebook, 64), quantize_codebook(flat.float(), codebook, 64), strict=True
    ):
        assert torch.equal(low, full)


def test_the_weights_are_not_touched() -> None:
    flat = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3
    before = flat.clone()
    quantize_codebook(flat, EIGHTHS, 64)
    assert torch.equal(flat, before)


def test_an_empty_tensor_packs_to_nothing_and_back() -> None:
    packed, absmax = quantize_codebook(torch.empty(0), EIGHTHS, 64)
    assert packed.shape == (0,)
    assert dequantize_codebook(packed, [absmax], EIGHTHS, 64, 0, torch.float16).shape == (0,)


def test_a_tensor_of_several_chunks_is_within_half_a_step_everywhere() -> None:
    count = blocks.CHUNK_ELEMENTS + 3 * 64 + 5
    flat = torch.rand(count, generator=torch.Generator().manual_seed(0)) - 1
    packed, absmax = quantize_codebook(flat, EIGHTHS, 64)
    restored = dequantize_codebook(packed, [absmax], EIGHTHS, 64, count, torch.float32)
    assert ((restored - flat).abs() <= spread(absmax, 64, count) * (1 / 16 + 1e-6)).all()
