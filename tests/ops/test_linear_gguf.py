"""Products with a weight that stays in GGUF blocks: as with the weight that the gguf package makes of them."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.layers.adapted_linear import adapted_linears
from entrenar.layers.adapted_native import AdaptedLinear
from entrenar.ops.linear import panels
from entrenar.ops.linear.gguf import (
    GGUF_TYPES,
    columns_of,
    decode_rows,
    gguf_panels,
)
from entrenar.ops.linear.weight import GGUFWeight
from tests.support.products import assert_close, packed_weight


@pytest.mark.parametrize("type", GGUF_TYPES)
@settings(max_examples=8, deadline=None)
@given(
    tokens=st.integers(0, 40), rows=st.integers(1, 70), blocks=st.integers(1, 3), panel=st.sampled_from([1, 1 << 20])
)
def test_products_are_those_with_the_dequantized_weight(
    type: str, tokens: int, rows: int, blocks: int, panel: int
) -> None:
    packed, weight = packed_weight(type, rows, blocks)
    columns = weight.shape[1]
    assert columns_of(packed, type) == columns
    torch.testing.assert_close(decode_rows(packed, type, torch.float32), weight, atol=0, rtol=0)
    x, grad, bias = torch.randn(tokens, columns), torch.randn(tokens, rows), torch.randn(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "PANEL_BYTES", panel)
        weights = gguf_panels(packed, type)
        torch.testing.assert_close(weights.product(x), x @ weight.t(), atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(weights.product(x, bias), x @ weight.t() + bias, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(weights.transposed_product(grad), grad @ weight, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("type", ["q4_k", "q8_0", "f16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_computed_in_as_they_are(type: str, dtype: torch.dtype) -> None:
    packed, weight = packed_weight(type, 65, 2)
    x = torch.randn(5, weight.shape[1], dtype=dtype)
    torch.testing.assert_close(GGUFWeight(packed, type).product(x), x @ weight.to(dtype).t())


@pytest.mark.parametrize("type", ["q4_0", "q4_k", "q6_k", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_in_bfloat16_the_blocks_are_decoded_inside_the_product(kernel_path: str, type: str, tokens: int) -> None:
    packed, weight = packed_weight(type, 67, 9)  # rows of more than a tile
    x, bias = torch.randn(2 * tokens, weight.shape[1]).bfloat16()[::2], torch.randn(67).bfloat16()
    dense = decode_rows(packed, type, torch.bfloat16).double()
    found = GGUFWeight(packed, type).product(x, bias)
    assert_close(found, x.double() @ dense.t() + bias, x.double().abs() @ dense.abs().t() + bias.double().abs())


@pytest.mark.parametrize("type", ["q4_1", "q6_k"])
def test_gradients_pass_through_the_blocks_exactly(type: str) -> None:
    """Analytic against numeric in float64, adapter included."""
    packed, weight = packed_weight(type, 6, 1)
    columns = weight.shape[1]
    x = torch.randn(3, columns, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, columns, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return adapted_linears(x, [AdaptedLinear(GGUFWeight(packed, type), None, a, b, 0.5)])[0]

    assert torch.autograd.gradcheck(layer, (x, a, b), fast_mode=True)


def test_a_converted_copy_of_a_weight_does_not_outlive_the_call() -> None:
    """The native product reads float16 as float32; a step over such a base must not hold it three times."""
    packed = packed_weight("f16", 613, 3)[0]
    members = [AdaptedLinear(GGUFWeight(packed, "f16"))]
    x = torch.randn(9, 96).bfloat16().requires_grad_()
    adapted_linears(x, members)[0].sum().backward()
    gc.collect()
    copies = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.shape == (613, 96)]
    assert [t.dtype for t in copies if t.dtype != torch.float16] == []


def test_a_tracer_sees_the_same_product() -> None:
    packed, weight = packed_weight("q4_k", 7, 1)
    x = torch.randn(2, 3, 256)
    torch.testing.assert_close(GGUFWeight(packed, "q4_k").traced(x, None), x @ weight.t())
