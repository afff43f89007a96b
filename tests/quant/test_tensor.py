"""QuantizedTensor: any shape in, the same shape out, every element within its format's bound, no byte uncounted."""

import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.quant.registry import FORMATS
from entrenar.quant.scales import block_scales
from entrenar.quant.tensor import (
    PieceQuantizer,
    QuantizedTensor,
    dequantize_4bit,
    packed_bytes,
    quantize,
    quantize_4bit,
)

FOUR_BIT = ["int4", "nf4", "fp4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = st.sampled_from([0, 1, 2, 3, 63, 64, 65, 127, 128, 129]) | st.integers(0, 300)
SHAPES = st.lists(SIZES, max_size=1) | st.lists(st.sampled_from([0, 1, 3, 8, 16, 33]), min_size=2, max_size=4)
BLOCKS = st.sampled_from([16, 32, 64, 256, 4096])
SEEDS = st.integers(0, 999)
LARGEST_CODE = {"int4": 7, "int8": 127, "nf4": 1, "fp4": 1}
# Half the widest gap between neighbouring values, in units of the block's scale.
HALF_GAP = {"int4": 0.5, "int8": 0.5, "nf4": 0.152, "fp4": 1 / 6}
# What float32 itself cannot tell apart: its denormals; and bitsandbytes' guard, below which a block becomes zeros.
SMALLEST = {"int4": 1e-43, "int8": 1e-43, "nf4": 1e-38, "fp4": 1e-38}


@dataclass(frozen=True)
class Case:
    """What to quantize, and how."""

    shape: list[int]
    seed: int
    magnitude: float
    dtype: torch.dtype
    format: str
    block_size: int
    double_quant: bool

    def weight(self) -> Tensor:
        """Random, with zeros, small and large values mixed."""
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(self.shape, generator=generator)
        sizes = torch.tensor([0.0, 1e-4, 1.0, 1.0])[torch.randint(0, 4, self.shape, generator=generator)]
        weight = values * sizes * self.magnitude
        return (weight.clamp(-6e4, 6e4) if self.dtype == torch.float16 else weight).to(self.dtype)

    def quantized(self) -> QuantizedTensor:
        return quantize(self.weight(), format=self.format, block_size=self.block_size, double_quant=self.double_quant)


CASES = st.builds(
    Case,
    shape=SHAPES,
    seed=SEEDS,
    magnitude=st.sampled_from([1e-42, 1e-38, 1e-5, 1.0, 1e4, 1e30]),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(list(FORMATS)),
    block_size=BLOCKS,
    double_quant=st.booleans(),
)


def true_scales(weight: Tensor, format: str, block_size: int) -> Tensor:
    """absmax over the format's largest code for every block, in float64."""
    flat = weight.reshape(-1).double()
    largest = [part.abs().max() for part in flat.split(block_size)] if flat.numel() else []
    return torch.tensor(largest, dtype=torch.float64) / LARGEST_CODE[format]


def bound(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """The largest error allowed for each element: half a gap, and what nesting did to the scale."""
    scales = true_scales(weight, quantized.format, quantized.block_size)
    codes = LARGEST_CODE[quantized.format]
    nesting = (block_scales(quantized.parts).double() - scales).abs() * codes if quantized.is_double_quantized else 0
    rounding = scales * codes * 1e-6 + SMALLEST[quantized.format]
    each = scales * HALF_GAP[quantized.format] + nesting + rounding
    return each.repeat_interleave(quantized.block_size)[: weight.numel()].view(weight.shape)


@given(CASES)
@settings(max_examples=250, deadline=None)
def test_every_element_is_within_the_formats_bound(case: Case) -> None:
    weight, quantized = case.weight(), case.quantized()
    restored = quantized.dequantize()
    assert restored.shape == weight.shape
    assert restored.dtype == torch.float32
    assert ((restored.double() - weight.double()).abs() <= bound(weight, quantized)).all()


@given(CASES)
@settings(max_examples=100, deadline=None)
def test_memory_bytes_are_the_bytes_that_the_parts_keep_alive(case: Case) -> None:
    quantized = case.quantized()
    alive = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in quantized.parts.values()}
    empty = sum(part.numel() == 0 for part in quantized.parts.values())
    assert len(alive) >= len(quantized.parts) - empty  # no two parts share a buffer
    assert quantized.memory_bytes == sum(alive.values())
    assert {part.dtype for part in quantized.parts.values()} == {torch.uint8}
    assert not any(part.requires_grad for part in quantized.parts.values())


@given(CASES)
@settings(max_examples=100, deadline=None)
def test_the_bytes_held_are_codes_and_one_copy_of_the_scales(case: Case) -> None:
    count = math.prod(case.shape)
    blocks = math.ceil(count / case.block_size)
    codes = count if case.format == "int8" else math.ceil(count / 2)
    scales = 4 * blocks
    if case.double_quant:
        scales = blocks + 4 * math.ceil(blocks / 256) + (4 if case.format in ("nf4", "fp4") else 0)
    assert case.quantized().memory_bytes == codes + scales
    assert packed_bytes(count, case.format, case.block_size, case.double_quant) == codes + scales


@given(CASES)
@settings(max_examples=100, deadline=None)
def test_quantizing_again_changes_no_code_and_the_weight_is_untouched(case: Case) -> None:
    weight = case.weight()
    before = weight.clone()
    once = quantize(weight, format=case.format, block_size=case.block_size)
    assert torch.equal(weight, before)
    assert quantize(weight, format=case.format, block_size=case.block_size).parts["codes"].equal(once.parts["codes"])
    assert (once.shape, once.dtype, once.numel) == (tuple(case.shape), case.dtype, weight.numel())


@given(count=st.integers(256, 20_000), format=st.sampled_from(FOUR_BIT), double_quant=st.booleans())
@settings(max_examples=60, deadline=None)
def test_four_bits_compress_float32_over_6_times_from_256_elements(count: int, format: str, double_quant: bool) -> None:
    quantized = quantize_4bit(torch.ones(count), format=format, double_quant=double_quant)
    assert quantized.compression_ratio == 4 * count / quantized.memory_bytes
    assert quantized.compression_ratio > 6


@pytest.mark.parametrize("format", FOUR_BIT)
def test_a_large_weight_takes_4_5_bits_and_4_127_with_double_quantization(format: str) -> None:
    weight = torch.ones(64, 64 * 256)
    plain, nested = (quantize_4bit(weight, format=format, double_quant=double) for double in (False, True))
    assert plain.memory_bytes * 8 / weight.numel() == 4.5
    assert nested.memory_bytes * 8 / weight.numel() == pytest.approx(4.127, abs=5e-4)
    assert not plain.is_double_quantized
    assert nested.is_double_quantized


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compression_ratio_counts_the_original_dtype(dtype: torch.dtype) -> None:
    quantized = quantize_4bit(torch.ones(64, 64, dtype=dtype))
    assert quantized.compression_ratio == pytest.approx(8 * dtype.itemsize / 4.5)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_a_zero_weight_comes_back_as_zeros(format: str, double_quant: bool) -> None:
    restored = quantize(torch.zeros(3, 50), format=format, double_quant=double_quant).dequantize()
    assert restored.abs().max() < 1e-37  # bitsandbytes stores 1e-38 as the absmax of a partial block of zeros


@pytest.mark.parametrize("format", FORMATS)
def test_a_block_of_zeros_among_others_is_exactly_zero(format: str) -> None:
    weight = torch.ones(192)
    weight[64:128] = 0
    restored = quantize(weight, format=format).dequantize()
    assert (restored == 0).tolist() == (weight == 0).tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_a_nested_block_of_zeros_costs_at_most_the_nesting_error(format: str) -> None:
    weight = torch.ones(192)
    weight[64:128] = 0
    restored = quantize(weight, format=format, double_quant=True).dequantize()
    assert restored[64:128].abs().max() == 0


@given(CASES, st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_a_lower_dtype_is_the_float32_value_rounded_once(case: Case, dtype: torch.dtype) -> None:
    quantized = case.quantized()
    assert torch.equal(quantized.dequantize(dtype), quantized.dequantize().to(dtype))


@given(CASES)
@settings(max_examples=60, deadline=None)
def test_float64_has_no_rounding_to_float32_in_it(case: Case) -> None:
    """Both are one product of a code's value and a scale, so they differ by one float32 rounding at most."""
    quantized = case.quantized()
    exact, rounded = quantized.dequantize(torch.float64), quantized.dequantize()
    assert torch.equal(exact.float(), rounded)


@pytest.mark.parametrize("format", FORMATS)
def test_strides_do_not_matter(format: str) -> None:
    weight = torch.randn(130, 66, generator=torch.Generator().manual_seed(0))
    for strided in (weight.t(), weight[::2, 1::3], weight.t()[3:, :65], weight[5].expand(3, 66)):
        found, expected = quantize(strided, format=format), quantize(strided.contiguous(), format=format)
        assert found.shape == tuple(strided.shape)
        assert all(torch.equal(found.parts[name], part) for name, part in expected.parts.items())


@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200),
    position=st.integers(0, 199),
    odd=st.sampled_from([math.nan, math.inf, -math.inf]),
    format=st.sampled_from(list(FORMATS)),
    double_quant=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_value_that_is_not_finite_is_an_error_that_names_the_tensor(
    values: list[float], position: int, odd: float, format: str, double_quant: bool
) -> None:
    weight = torch.tensor(values)
    assert quantize(weight, format=format).dequantize().isfinite().all()
    weight[position % len(values)] = odd
    with pytest.raises(InputError, match=r"model\.layers\.3\.weight holds a NaN or an infinity"):
        quantize(weight, format=format, double_quant=double_quant, name="model.layers.3.weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool, torch.complex64])
def test_a_dtype_that_is_no_weight_is_an_error_that_says_what_is_taken(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=rf"q_proj is {dtype}.*float32, float16 or bfloat16"):
        quantize(torch.ones(64, dtype=dtype), format="nf4", name="q_proj")


def test_a_wrong_format_or_block_size_is_an_error() -> None:
    with pytest.raises(InputError, match="unknown number format 'nf5'"):
        quantize(torch.ones(64), format="nf5")
    with pytest.raises(InputError, match="block size 48"):
        quantize(torch.ones(64), format="nf4", block_size=48)
    with pytest.raises(InputError, match="int8 is not a 4-bit format"):
        quantize_4bit(torch.ones(64), format="int8")
    with pytest.raises(InputError, match="give nf4 a block size"):
        quantize(torch.ones(64), format="nf4", block_size=None)


@pytest.mark.parametrize("shape", [(5, 33), (1, 1), (2, 3, 7), (9,), (0, 4), (4, 0)])
def test_int8_by_row_has_one_scale_a_row(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, format="int8", block_size=None)
    rows = weight.reshape(-1, max(shape[-1], 1))
    assert quantized.memory_bytes == weight.numel() + 4 * len(rows)
    assert torch.allclose(block_scales(quantized.parts), rows.abs().amax(dim=1) / 127, rtol=1e-6)
    assert ((quantized.dequantize() - weight).abs() <= bound(weight, quantized)).all()


def test_a_parameter_is_quantized_without_its_graph() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    restored = dequantize_4bit(quantize_4bit(weight))
    assert not restored.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_4bit_gives_the_shape_and_dtype_asked_for(dtype: torch.dtype) -> None:
    restored = dequantize_4bit(quantize_4bit(torch.randn(3, 5, 7)), dtype)
    assert (restored.shape, restored.dtype) == ((3, 5, 7), dtype)


def test_a_scalar_has_a_shape_too() -> None:
    for format in FORMATS:
        restored = quantize(torch.tensor(-3.0), format=format).dequantize()
        assert restored.shape == ()
        assert restored.item() == pytest.approx(-3.0, rel=1e-6)


@given(case=CASES, piece=st.integers(1, 5), order=st.randoms())
@settings(max_examples=120, deadline=None)
def test_a_weight_that_comes_in_pieces_in_any_order_has_the_same_bytes(
    case: Case, piece: int, order: random.Random
) -> None:
    weight, step = case.weight(), piece * case.block_size
    pieces = list(enumerate(weight.flatten().split(step)))
    order.shuffle(pieces)
    quantizer = PieceQuantizer(
        tuple(weight.shape), weight.dtype,
        format=case.format, block_size=case.block_size, double_quant=case.double_quant, name="weight",
    )  # fmt: skip
    for number, values in pieces:
        quantizer.take(number * step, values)
    found, expected = quantizer.finish(), case.quantized()
    assert (found.format, found.shape, found.dtype, found.block_size) == (
        expected.format, expected.shape, expected.dtype, expected.block_size,
    )  # fmt: skip
    assert found.parts.keys() == expected.parts.keys()
    assert all(torch.equal(found.parts[name], part) for name, part in expected.parts.items())


def _quantizer(dtype: torch.dtype = torch.float32, **changed: Any) -> PieceQuantizer:
    options = {"format": "nf4", "block_size": 64, "double_quant": False, "name": "q_proj"}
    return PieceQuantizer((2, 64), dtype, **(options | changed))


def test_in_pieces_too_the_same_inputs_are_refused() -> None:
    with pytest.raises(InputError, match=r"q_proj is torch\.float64.*float32, float16 or bfloat16"):
        _quantizer(torch.float64)
    with pytest.raises(InputError, match="unknown number format 'nf5'"):
        _quantizer(format="nf5")
    with pytest.raises(InputError, match="block size 48"):
        _quantizer(block_size=48)
    quantizer = _quantizer()
    quantizer.take(64, torch.tensor([math.nan]).expand(64))
    quantizer.take(0, torch.ones(64))
    with pytest.raises(InputError, match="q_proj holds a NaN or an infinity"):
        quantizer.finish()
