"""LoRALayer: y = x·W₀ᵀ + bias + scale·B(A(x)) over a frozen float weight."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from entrenar.core.errors import InputError
from entrenar.lora.lora_layer import LoRALayer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained_layer(
    d_out: int = 12, d_in: int = 10, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> LoRALayer:
    """A layer whose B is not zero any more."""
    layer = LoRALayer(random(d_out, d_in, dtype=dtype), min(3, d_out, d_in), 5.0, dropout)
    layer.lora_b.data.copy_(random(*layer.lora_b.shape, seed=1))
    return layer


def expected_output(layer: LoRALayer, x: Tensor) -> Tensor:
    """The definition, in float64."""
    a, b, w = (t.detach().double() for t in (layer.lora_a, layer.lora_b, layer.base_weight))
    return x.double() @ (w + layer.alpha / layer.rank * b @ a).T


@given(lead=st.lists(st.integers(0, 3), max_size=3), d_out=st.integers(1, 20), d_in=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_the_output_is_the_definition_for_any_leading_shape(lead: list[int], d_out: int, d_in: int) -> None:
    layer, x = trained_layer(d_out, d_in), random(*lead, d_in, seed=2)
    y = layer(x)
    assert y.shape == (*lead, d_out)
    assert torch.allclose(y.double(), expected_output(layer, x), atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.3), (torch.float16, 0.03)])
def test_the_compute_dtype_is_that_of_x_and_the_factors_stay_float32(dtype: torch.dtype, tolerance: float) -> None:
    layer, x = trained_layer(), random(4, 10, seed=2, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.allclose(y.double(), expected_output(layer, x), atol=tolerance)
    y.sum().backward()
    for factor in layer.trainable_params():
        assert factor.grad is not None
        assert (factor.dtype, factor.grad.dtype) == (torch.float32, torch.float32)


def test_the_bias_is_added_and_frozen() -> None:
    weight, bias, x = random(12, 10), random(12, seed=3), random(4, 10, seed=2)
    layer = LoRALayer(weight, rank=3, bias=bias)
    assert torch.equal(layer(x), F.linear(x, weight, bias))
    assert layer.bias is not None
    assert not layer.bias.requires_grad


def test_a_fresh_adapter_changes_nothing() -> None:
    weight, x = random(12, 10), random(4, 10, seed=2)
    assert torch.equal(LoRALayer(weight, rank=3)(x), F.linear(x, weight))


def test_gradients_of_a_b_and_x_are_the_numeric_ones() -> None:
    layer = trained_layer(5, 7).double()
    inputs = (layer.lora_a, layer.lora_b, random(2, 3, 7, seed=2).double().requires_grad_())

    def run(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))

    assert torch.autograd.gradcheck(run, inputs)


def test_the_base_has_no_gradient() -> None:
    layer = LoRALayer(torch.nn.Parameter(random(12, 10)), rank=3, bias=random(12))
    layer(random(4, 10).requires_grad_()).sum().backward()
    assert not layer.base_weight.requires_grad
    assert layer.base_weight.grad is None


def test_dropout_is_on_the_adapters_input_while_training_and_nowhere_else() -> None:
    layer, x = trained_layer(dropout=0.5), random(4, 10, seed=2)
    assert torch.allclose(layer.eval()(x).double(), expected_output(layer, x), atol=1e-4)
    torch.manual_seed(7)
    y = layer.train()(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    undropped_base = F.linear((x - dropped).double(), layer.base_weight.double())
    assert torch.allclose(y.double(), expected_output(layer, dropped) + undropped_base, atol=1e-4)


@given(st.sampled_from(DTYPES), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1e-6, 1.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_unmerge_gives_the_base_back_to_the_last_bit(dtype: torch.dtype, d_out: int, d_in: int, size: float) -> None:
    layer = trained_layer(d_out, d_in, dtype)
    layer.lora_b.data *= size
    before = layer.base_weight.detach().clone()
    layer.merge()
    assert layer.is_merged
    layer.unmerge()
    assert not layer.is_merged
    assert torch.equal(layer.base_weight, before)
    assert layer.base_weight.dtype == dtype


def test_a_merged_layer_gives_the_same_output_from_its_base_alone() -> None:
    layer, x = trained_layer(), random(4, 10, seed=2)
    apart = layer(x)
    layer.merge()
    assert torch.allclose(layer(x), apart, atol=1e-5)
    assert torch.equal(layer(x), F.linear(x, layer.base_weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_rounds_once_to_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    layer = trained_layer(dtype=dtype)
    exact = layer.merge_to_f32()
    layer.merge()
    assert torch.equal(layer.base_weight, exact.to(dtype))


def test_merging_does_not_write_into_the_weight_that_was_given() -> None:
    weight = random(12, 10)
    layer = LoRALayer(weight, rank=3)
    assert layer.base_weight.data_ptr() == weight.data_ptr()
    layer.lora_b.data.fill_(1.0)
    layer.merge()
    assert torch.equal(weight, random(12, 10))


def test_merge_to_f32_is_the_definition_whether_merged_or_not() -> None:
    layer = trained_layer(dtype=torch.bfloat16)
    exact = expected_output(layer, torch.eye(10)).T
    first = layer.merge_to_f32()
    layer.merge()
    assert (first.dtype, first.shape) == (torch.float32, (12, 10))
    assert not first.requires_grad
    assert torch.allclose(first.double(), exact, atol=1e-5)
    assert torch.equal(layer.merge_to_f32(), first)


def test_merging_twice_or_undoing_nothing_is_an_error_that_says_what_to_do() -> None:
    layer = trained_layer()
    with pytest.raises(InputError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(InputError, match=r"merged already: call unmerge\(\)"):
        layer.merge()


def test_memory_stats_count_what_is_held() -> None:
    layer = LoRALayer(random(12, 10, dtype=torch.bfloat16), rank=3)
    stats = layer.memory_stats()
    assert stats.base_quantized_bytes == 12 * 10 * 2
    assert stats.base_unquantized_bytes == 12 * 10 * 4
    assert stats.lora_bytes == 4 * 3 * (12 + 10)
    assert stats.total_bytes == sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert stats.compression_ratio == 2.0
