"""Products with a weight of one byte an element: as with the weight it dequantizes to, however its scales are held."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.layers.adapted_linear import adapted_linears
from entrenar.layers.adapted_native import AdaptedLinear
from entrenar.ops.linear import panels
from entrenar.ops.linear.multiply import Term, int8_weight, multiply
from entrenar.ops.linear.weight import Int8Weight
from entrenar.ops.scales import nest_scales
from entrenar.ops.symmetric.dequantize import dequantize_int8
from tests.support.products import assert_close, exact


def weight(rows: int, columns: int, block_size: int, nested: bool = False) -> Int8Weight:
    codes = torch.randint(0, 256, (rows * columns,), dtype=torch.uint8)
    scales = torch.rand(-(-rows * columns // block_size)) * 0.01
    return Int8Weight(codes, nest_scales(scales) if nested else [scales], block_size, (rows, columns))


def dense(of: Int8Weight, dtype: torch.dtype) -> Tensor:
    return dequantize_int8(of.codes, of.scales, of.block_size, dtype).view(of.shape)


SIZES = st.integers(1, 140)
# A power of two from 16, or a row's length, which may be any.
BLOCKS = st.sampled_from([16, 64, 4096, 0])


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 40), rows=SIZES, columns=SIZES, block=BLOCKS, nested=st.booleans())
def test_in_bfloat16_the_codes_are_decoded_inside_the_product(
    kernel_path: str, tokens: int, rows: int, columns: int, block: int, nested: bool
) -> None:
    of = weight(rows, columns, block or columns, nested)
    matrix = dense(of, torch.bfloat16)
    x, grad = torch.randn(tokens, columns).bfloat16(), torch.randn(tokens, rows).bfloat16()
    bias = torch.randn(rows).bfloat16()
    assert_close(of.product(x), *exact([(x, matrix.t())]))
    value, size = exact([(x, matrix.t())])
    assert_close(of.product(x, bias), value + bias, size + bias.double().abs())
    assert_close(of.transposed_product(grad), *exact([(grad, matrix)]))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40), rows=SIZES, columns=SIZES, block=BLOCKS, nested=st.booleans(),
    panel=st.sampled_from([1, 1 << 20]),
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_other_dtypes_a_panel_of_rows_is_decoded_at_a_time(
    dtype: torch.dtype, tokens: int, rows: int, columns: int, block: int, nested: bool, panel: int
) -> None:
    of = weight(rows, columns, block or columns, nested)
    matrix, x, grad = (
        dense(of, dtype),
        torch.randn(tokens, columns, dtype=dtype),
        torch.randn(tokens, rows, dtype=dtype),
    )
    bias = torch.randn(rows, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "PANEL_BYTES", panel)
        torch.testing.assert_close(of.product(x, bias), x @ matrix.t() + bias, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(of.transposed_product(grad), grad @ matrix, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(of.traced(x, bias), x @ matrix.t() + bias, atol=1e-4, rtol=1e-4)


def test_gradients_are_the_numeric_ones() -> None:
    """Analytic against numeric in float64, adapter included."""
    of = weight(6, 10, 16)
    shapes = ((3, 10), (2, 10), (6, 2))
    x, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapted_linears(x, [AdaptedLinear(of, None, a, b, 0.5)])[0]

    assert torch.autograd.gradcheck(layer, (x, a, b), fast_mode=True)


@pytest.mark.skipif(not native.available(), reason="the native library is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_weight_is_never_decoded_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    largest = [0]

    def tracked(codes: Tensor, *rest: object) -> Tensor:
        largest.append(codes.numel())
        return dequantize_int8(codes, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("entrenar.ops.linear.weight.dequantize_int8", tracked)
    of = weight(4096, 1024, 64)
    x = torch.randn(5, 1024).to(dtype).requires_grad_()
    adapted_linears(x, [AdaptedLinear(of)])[0].sum().backward()
    assert max(largest) * dtype.itemsize <= (0 if dtype == torch.bfloat16 else panels.PANEL_BYTES)


@pytest.mark.usefixtures("native_path")
def test_a_buffer_too_small_or_a_block_of_nothing_is_refused() -> None:
    codes, scales, x = torch.zeros(31, dtype=torch.uint8), [torch.zeros(1)], torch.randn(3, 8).bfloat16()
    bad = (
        int8_weight(codes, scales, 64, (4, 8)),
        int8_weight(torch.zeros(32, dtype=torch.uint8), [torch.zeros(1)], 16, (4, 8)),
        int8_weight(torch.zeros(32, dtype=torch.uint8), scales, 0, (4, 8)),
        int8_weight(torch.zeros(32, dtype=torch.uint8), scales, -1, (4, 8)),
    )
    out = torch.full((3, 4), 7.0)
    for one in bad:
        with pytest.raises(InputError):
            multiply([Term(x, one, transposed=True)], out)
    assert (out == 7).all()
