"""QuantizedLinear: a linear layer over the dequantized weight that keeps nothing but the packed one."""

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.layers.quantized_linear import QuantizedLinear, quantized_linear
from entrenar.quant.codebooks import codebook
from entrenar.quant.registry import FORMATS
from entrenar.quant.tensor import QuantizedTensor, quantize

HOLDINGS = [(format, double) for format in FORMATS for double in (False, True)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def packed(d_out: int = 24, d_in: int = 40, format: str = "nf4", double_quant: bool = False) -> QuantizedTensor:
    return quantize(random(d_out, d_in), format=format, block_size=16, double_quant=double_quant)


def part_bytes(weight: QuantizedTensor) -> dict[str, bytes]:
    return {name: part.numpy().tobytes() for name, part in weight.parts.items()}


@pytest.mark.parametrize(("format", "double_quant"), HOLDINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_torchs_linear_over_the_dequantized_weight(format: str, double_quant: bool, dtype: torch.dtype) -> None:
    weight, bias, x = packed(format=format, double_quant=double_quant), random(24), random(5, 40, dtype=dtype)
    y = QuantizedLinear(weight, bias)(x)
    assert y.dtype == dtype
    # The same products, summed in another order: equal to the rounding of the dtype.
    torch.testing.assert_close(y, F.linear(x, weight.dequantize(dtype), bias.to(dtype)))


@given(lead=st.lists(st.integers(0, 4), max_size=3), d_out=st.integers(1, 70), d_in=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_the_input_may_have_any_leading_shape(lead: list[int], d_out: int, d_in: int) -> None:
    weight, x = packed(d_out, d_in), random(*lead, d_in).requires_grad_()
    y = QuantizedLinear(weight)(x)
    assert y.shape == (*lead, d_out)
    assert torch.allclose(y, x @ weight.dequantize().t(), atol=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.dequantize().sum(dim=0).expand_as(x), atol=1e-4)


@pytest.mark.parametrize(("format", "double_quant"), HOLDINGS)
def test_the_gradient_of_x_is_the_numeric_one(format: str, double_quant: bool) -> None:
    layer = QuantizedLinear(packed(7, 9, format, double_quant), random(7))
    x = random(2, 3, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_weight_that_was_used_can_be_copied_and_moved() -> None:
    weight, x = packed(), random(3, 40)
    expected = quantized_linear(x, weight)
    twin = copy.deepcopy(weight)
    weight.parts["codes"].zero_()
    assert torch.equal(quantized_linear(x, twin), expected)
    assert not torch.equal(quantized_linear(x, weight), expected)
    twin.parts["codes"] = weight.parts["codes"].clone()
    assert torch.equal(quantized_linear(x, twin), quantized_linear(x, weight))


def test_the_base_has_no_gradient() -> None:
    layer = QuantizedLinear(packed(), random(24))
    layer(random(3, 40).requires_grad_()).sum().backward()
    assert [p.requires_grad for p in layer.parameters()] == [False] * 3
    assert all(p.grad is None for p in layer.parameters())


def test_without_a_gradient_to_pass_on_the_output_needs_none() -> None:
    assert not QuantizedLinear(packed(), random(24))(random(3, 40)).requires_grad


def test_only_the_packed_weight_is_saved_for_the_backward_neither_x_nor_a_dense_weight() -> None:
    weight, x = packed(47, 59), random(3, 59).requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = quantized_linear(x, weight, random(47))
    held = [*weight.parts.values(), codebook("nf4", x.device)]
    assert {tensor.data_ptr() for tensor in saved} <= {tensor.data_ptr() for tensor in held}
    dense = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.numel() == 47 * 59]
    assert dense == []
    y.sum().backward()
    assert x.grad is not None


def test_the_layer_holds_the_packed_bytes_and_the_bias_and_nothing_else() -> None:
    weight = packed(double_quant=True)
    layer = QuantizedLinear(weight, random(24))
    held = {name: tensor.untyped_storage().nbytes() for name, tensor in layer.state_dict().items()}
    assert set(held) == {"weight_codes", "weight_scales", "weight_nested_scales", "weight_offset", "bias"}
    assert sum(held.values()) == weight.memory_bytes + 4 * 24
    for name, part in weight.parts.items():
        assert layer.get_parameter(f"weight_{name}").data_ptr() == part.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_does_not_round_its_scales(dtype: torch.dtype) -> None:
    weight = packed(double_quant=True)
    before = part_bytes(weight)
    layer = nn.Sequential(QuantizedLinear(weight, random(24))).to(dtype)[0]
    assert isinstance(layer, QuantizedLinear)
    assert part_bytes(layer.quantized_weight) == before


@pytest.mark.parametrize(("format", "double_quant"), HOLDINGS)
def test_a_state_dict_goes_through_safetensors_to_another_layer(
    tmp_path: Path, format: str, double_quant: bool
) -> None:
    layer = QuantizedLinear(packed(format=format, double_quant=double_quant), random(24))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    zeros = quantize(torch.zeros(24, 40), format=format, block_size=16, double_quant=double_quant)
    other = QuantizedLinear(zeros, torch.zeros(24))
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"), strict=True)
    x = random(3, 40, seed=1)
    assert torch.equal(other(x), layer(x))


def test_a_deep_copy_stands_on_its_own() -> None:
    layer = QuantizedLinear(packed())
    twin = copy.deepcopy(layer)
    x = random(3, 40, seed=1)
    expected = layer(x)
    layer.get_parameter("weight_codes").data.zero_()
    assert torch.equal(twin(x), expected)
    assert not torch.equal(layer(x), expected)


def test_the_fused_weight_is_the_dequantized_one() -> None:
    weight = packed()
    assert torch.equal(QuantizedLinear(weight).dequantized(), weight.dequantize())


@pytest.mark.parametrize("shape", [(8,), (), (2, 3, 4)])
def test_a_weight_that_is_not_two_dimensional_is_an_error_that_shows_it(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        QuantizedLinear(quantize(torch.ones(shape), format="nf4"))
    assert "2 dimensions" in str(caught.value)
    assert str(shape) in str(caught.value)


def test_printing_a_layer_says_how_it_is_held() -> None:
    text = repr(QuantizedLinear(packed(double_quant=True)))
    for fact in ("in_features=40", "out_features=24", "nf4", "block_size=16", "double_quant=True", "bias=False"):
        assert fact in text
