"""nf4 and fp4 against bitsandbytes: every byte of codes and scales, and every dequantized value.

bitsandbytes' AVX512 kernel dequantizes rightly only where each row is a whole number of blocks, or where there is one
row (its scale index assumes it, and its pull request 2072 says so), so values are compared there; codes and scales
everywhere.
"""

import math

import bitsandbytes.functional as peer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.quant.codebooks import codebook, dynamic_map
from entrenar.quant.scales import as_float, block_scales
from entrenar.quant.tensor import QuantizedTensor, quantize_4bit

pytestmark = pytest.mark.interop

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = st.sampled_from(["nf4", "fp4"])
BLOCK_SIZES = st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])
COUNTS = st.sampled_from([1, 2, 63, 64, 65, 127, 129, 255, 257]) | st.integers(1, 5000)
SHAPES = st.tuples(COUNTS) | st.tuples(st.integers(1, 60), st.integers(1, 90))
SEEDS = st.integers(0, 9999)
KINDS = st.sampled_from(["normal", "zero", "sparse", "coarse", "small", "large", "spread"])


def weight(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """A random weight; coarse ones tie between codes, sparse ones have blocks of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    makers = {
        "zero": lambda: values * 0.0,
        "sparse": lambda: values * (torch.rand(shape, generator=generator) < 0.01),
        "coarse": lambda: (values * 4).round() / 4,
        "small": lambda: values * (1e-6 if dtype == torch.float16 else 1e-39),
        "large": lambda: values.clamp(-5, 5) * (1e4 if dtype == torch.float16 else 1e30),
        "spread": lambda: values * torch.logspace(-8, 3, math.prod(shape)).view(shape),
    }
    return makers.get(kind, lambda: values)().to(dtype)


def both(w: Tensor, format: str, block_size: int, nested: bool) -> tuple[QuantizedTensor, Tensor, peer.QuantState]:
    """Ours, bitsandbytes' bytes and its state."""
    packed, state = peer.quantize_4bit(w, blocksize=block_size, compress_statistics=nested, quant_type=format)
    return quantize_4bit(w, format=format, block_size=block_size, double_quant=nested), packed, state


def nested_state(state: peer.QuantState) -> tuple[peer.QuantState, Tensor]:
    """What bitsandbytes holds of the scales of scales: their state and the offset."""
    assert state.state2 is not None
    assert state.offset is not None
    return state.state2, state.offset


def equal_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.numpy().tobytes() == theirs.contiguous().view(torch.uint8).numpy().tobytes()


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), kind=KINDS, format=FORMATS, block_size=BLOCK_SIZES, seed=SEEDS)
@settings(max_examples=300, deadline=None)
def test_codes_and_absmax_are_equal_to_the_byte(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, format: str, block_size: int, seed: int
) -> None:
    ours, packed, state = both(weight(shape, dtype, kind, seed), format, block_size, False)
    assert equal_bits(ours.parts["codes"], packed)
    assert equal_bits(ours.parts["scales"], state.absmax)
    assert ours.parts.keys() == {"codes", "scales"}


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), kind=KINDS, format=FORMATS, block_size=BLOCK_SIZES, seed=SEEDS)
@settings(max_examples=300, deadline=None)
def test_nested_scales_and_their_offset_are_equal_to_the_byte(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, format: str, block_size: int, seed: int
) -> None:
    ours, packed, state = both(weight(shape, dtype, kind, seed), format, block_size, True)
    assert equal_bits(ours.parts["codes"], packed)
    assert equal_bits(ours.parts["scales"], state.absmax)
    second, offset = nested_state(state)
    assert equal_bits(ours.parts["nested_scales"], second.absmax)
    assert equal_bits(ours.parts["offset"], offset.view(1))


@given(count=st.integers(1, 40_000), seed=SEEDS, format=FORMATS)
@settings(max_examples=25, deadline=None)
def test_nested_scales_of_many_groups_are_equal_to_the_byte(count: int, seed: int, format: str) -> None:
    ours, _, state = both(weight((count,), torch.float32, "normal", seed), format, 32, True)
    assert equal_bits(ours.parts["scales"], state.absmax)
    second, offset = nested_state(state)
    assert equal_bits(ours.parts["nested_scales"], second.absmax)
    unpacked = peer.dequantize_blockwise(state.absmax, second) + offset
    assert torch.equal(block_scales(ours.parts), unpacked.view(-1))


@given(
    rows=st.integers(1, 20),
    blocks=st.integers(1, 4),
    block_size=st.sampled_from([32, 64, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "sparse", "coarse", "large"]),
    out=st.sampled_from(DTYPES),
    format=FORMATS,
    nested=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_dequantized_matrices_are_equal(
    rows: int, blocks: int, block_size: int, dtype: torch.dtype, kind: str, out: torch.dtype, format: str, nested: bool
) -> None:
    ours, packed, state = both(weight((rows, blocks * block_size), dtype, kind, rows), format, block_size, nested)
    state.dtype = out
    assert torch.equal(ours.dequantize(out), peer.dequantize_4bit(packed, state))


@given(
    half=st.integers(1, 1500),
    block_size=st.sampled_from([32, 64, 256, 1024]),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    format=FORMATS,
    nested=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_dequantized_vectors_with_a_partial_block_are_equal(
    half: int, block_size: int, dtype: torch.dtype, out: torch.dtype, format: str, nested: bool
) -> None:
    ours, packed, state = both(weight((2 * half,), dtype, "normal", half), format, block_size, nested)
    state.dtype = out
    assert torch.equal(ours.dequantize(out), peer.dequantize_4bit(packed, state).view(-1))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_codebooks_are_equal(format: str) -> None:
    assert torch.equal(codebook(format, CPU), peer.get_4bit_type(format, device="cpu"))


def test_the_dynamic_map_is_equal() -> None:
    assert torch.equal(dynamic_map(CPU), peer.create_dynamic_map())


def test_bytes_of_ours_are_a_weight_for_bitsandbytes() -> None:
    """A state built from our parts dequantizes there to what we dequantize here."""
    ours = quantize_4bit(weight((48, 128), torch.bfloat16, "normal", 0), format="nf4", double_quant=True)
    parts = ours.parts
    nested = peer.QuantState(absmax=as_float(parts["nested_scales"]), code=peer.create_dynamic_map(), blocksize=256)
    nested.dtype = torch.float32
    state = peer.QuantState(
        absmax=parts["scales"], shape=torch.Size(ours.shape), dtype=torch.bfloat16, blocksize=64, quant_type="nf4",
        code=peer.get_4bit_type("nf4", device="cpu"), offset=as_float(parts["offset"])[0], state2=nested,
    )  # fmt: skip
    theirs = peer.dequantize_4bit(parts["codes"].view(-1, 1), state)
    assert torch.equal(ours.dequantize(torch.bfloat16), theirs)
