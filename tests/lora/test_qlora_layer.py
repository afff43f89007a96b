"""QLoRALayer: a low-rank adapter over a quantized weight that never changes."""

import copy
import gc
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from entrenar.core.errors import InputError
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.qlora_layer import QLoRALayer
from entrenar.quant.registry import FORMATS
from entrenar.quant.tensor import quantize

HOLDINGS = [(format, double) for format in FORMATS for double in (False, True)]
every_holding = pytest.mark.parametrize(("format", "double_quant"), HOLDINGS)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained_layer(
    d_out: int = 12, d_in: int = 10, format: str = "nf4", double_quant: bool = False, bias: Tensor | None = None
) -> QLoRALayer:
    """A layer whose B is not zero any more."""
    rank = min(3, d_out, d_in)
    layer = QLoRALayer(random(d_out, d_in), rank, 5.0, bias=bias, format=format, double_quant=double_quant)
    layer.lora_b.data.copy_(random(d_out, rank, seed=1))
    return layer


def float_twin(layer: QLoRALayer) -> LoRALayer:
    """The same adapter over the dequantized base: what the quantized layer must compute."""
    twin = LoRALayer(layer.base_weight_quantized.dequantize(), layer.rank, layer.alpha, bias=layer.base.bias)
    twin.lora_a.data.copy_(layer.lora_a.data)
    twin.lora_b.data.copy_(layer.lora_b.data)
    return twin


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    d_out=st.integers(1, 20),
    d_in=st.integers(1, 20),
    holding=st.sampled_from(HOLDINGS),
)
@settings(max_examples=60, deadline=None)
def test_output_and_gradients_are_those_of_a_float_layer_over_the_dequantized_base(
    lead: list[int], d_out: int, d_in: int, holding: tuple[str, bool]
) -> None:
    layer = trained_layer(d_out, d_in, *holding, bias=random(d_out, seed=4))
    twin = float_twin(layer)
    x, x_twin = (random(*lead, d_in, seed=2).requires_grad_() for _ in range(2))
    y, y_twin = layer(x), twin(x_twin)
    assert y.shape == (*lead, d_out)
    assert torch.allclose(y, y_twin, atol=1e-5)
    for output in (y, y_twin):
        output.square().sum().backward()
    for ours, theirs in ((layer.lora_a, twin.lora_a), (layer.lora_b, twin.lora_b), (x, x_twin)):
        assert torch.allclose(grad(ours), grad(theirs), rtol=1e-4, atol=1e-3)


@every_holding
def test_gradients_of_a_b_and_x_are_the_numeric_ones(format: str, double_quant: bool) -> None:
    layer = trained_layer(5, 7, format, double_quant, bias=random(5)).double()
    inputs = (layer.lora_a, layer.lora_b, random(2, 3, 7, seed=2).double().requires_grad_())

    def run(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))

    assert torch.autograd.gradcheck(run, inputs)


@every_holding
def test_gradient_reaches_a_b_and_x_and_the_base_has_none(format: str, double_quant: bool) -> None:
    layer, x = trained_layer(format=format, double_quant=double_quant), random(4, 10, seed=2).requires_grad_()
    layer(x).square().sum().backward()
    assert all(grad(tensor).any() for tensor in (layer.lora_a, layer.lora_b, x))
    assert [p.requires_grad for p in layer.base.parameters()] == [False] * len(layer.base_weight_quantized.parts)
    assert all(p.grad is None for p in layer.base.parameters())


def test_a_training_step_leaves_the_packed_bytes_alone() -> None:
    layer = trained_layer()
    before = {name: part.clone() for name, part in layer.base_weight_quantized.parts.items()}
    optimizer = torch.optim.AdamW(layer.trainable_params(), lr=0.1)
    layer(random(4, 10)).square().sum().backward()
    a = layer.lora_a.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.lora_a, a)
    assert all(torch.equal(part, before[name]) for name, part in layer.base_weight_quantized.parts.items())


def test_no_dense_weight_is_kept_for_the_backward() -> None:
    layer, x = trained_layer(47, 59), random(3, 59, seed=2).requires_grad_()
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():  # the packed weight is uint8 and is what may be kept
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.numel() == 47 * 59]
    assert alive == []
    assert y.requires_grad
    low_rank = 3 * 59 + 3 * 3 + 3 * (47 + 59)  # x, A(x), A and B: what a low-rank product needs
    assert sum(saved) <= low_rank + 44 + 16  # and the base's block scales and codebook
    assert max(saved) < 47 * 59


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.3), (torch.float16, 0.03)])
def test_the_compute_dtype_is_that_of_x_and_the_factors_stay_float32(dtype: torch.dtype, tolerance: float) -> None:
    layer, x = trained_layer(), random(4, 10, seed=2, dtype=dtype)
    y = layer(x)
    exact_base = layer.base_weight_quantized.dequantize(torch.float64)
    exact = x.double() @ (exact_base + layer.scale * layer.lora_b.double() @ layer.lora_a.double()).T
    assert y.dtype == dtype
    assert torch.allclose(y.double(), exact, atol=tolerance)
    y.sum().backward()
    assert (layer.lora_a.dtype, grad(layer.lora_b).dtype) == (torch.float32, torch.float32)


@every_holding
def test_a_fresh_adapter_gives_what_the_quantized_base_gives(format: str, double_quant: bool) -> None:
    weight, x = random(12, 10), random(4, 10, seed=2)
    layer = QLoRALayer(weight, rank=3, format=format, double_quant=double_quant)
    base = quantize(weight, format=format, double_quant=double_quant).dequantize()
    torch.testing.assert_close(layer(x), F.linear(x, base))  # the same products, summed in another order
    assert layer.is_double_quantized is double_quant
    assert layer.base_weight_quantized.format == format


def test_a_quantized_tensor_is_taken_over_as_it_is() -> None:
    weight = quantize(random(12, 10), format="int4", block_size=16, double_quant=True)
    held = QLoRALayer(weight, rank=3).base_weight_quantized
    assert (held.format, held.block_size, held.is_double_quantized) == ("int4", 16, True)
    assert [p.data_ptr() for p in held.parts.values()] == [p.data_ptr() for p in weight.parts.values()]


@every_holding
def test_merge_to_f32_is_the_dequantized_base_and_the_adapter(format: str, double_quant: bool) -> None:
    layer = trained_layer(format=format, double_quant=double_quant)
    merged = layer.merge_to_f32()
    base = layer.base_weight_quantized.dequantize(torch.float64)
    exact = base + layer.alpha / layer.rank * layer.lora_b.double() @ layer.lora_a.double()
    assert (merged.dtype, merged.shape, merged.requires_grad) == (torch.float32, (12, 10), False)
    assert torch.allclose(merged.double(), exact, atol=1e-5)
    x = random(4, 10, seed=2)
    assert torch.allclose(x @ merged.T, layer(x), atol=1e-4)


def test_merging_in_place_is_an_error_that_names_merge_to_f32() -> None:
    layer = trained_layer()
    before = layer(torch.eye(10))
    with pytest.raises(InputError, match="merge_to_f32"):
        layer.merge()
    assert layer.is_merged is False
    assert torch.equal(layer(torch.eye(10)), before)


@every_holding
def test_from_lora_quantizes_the_base_and_copies_the_adapter(format: str, double_quant: bool) -> None:
    lora = LoRALayer(random(12, 10), rank=3, alpha=5.0, dropout=0.25, bias=random(12, seed=3))
    lora.lora_b.data.copy_(random(12, 3, seed=1))
    layer = QLoRALayer.from_lora(lora, format=format, double_quant=double_quant)
    base = quantize(lora.base_weight, format=format, double_quant=double_quant).dequantize()
    assert torch.equal(layer.base_weight_quantized.dequantize(), base)
    assert (layer.rank, layer.scale, layer.dropout) == (lora.rank, lora.scale, lora.dropout)
    assert torch.equal(layer.lora_a, lora.lora_a)
    assert torch.equal(layer.lora_b, lora.lora_b)
    layer.lora_b.data.zero_()
    assert lora.lora_b.any()
    assert torch.equal(layer.eval()(torch.eye(10)), F.linear(torch.eye(10), base, lora.bias))


def test_from_a_merged_layer_is_an_error_that_says_what_to_do() -> None:
    lora = LoRALayer(random(12, 10), rank=3)
    lora.merge()
    with pytest.raises(InputError, match=r"call unmerge\(\) first"):
        QLoRALayer.from_lora(lora)


@given(
    d_out=st.integers(1, 150),
    d_in=st.integers(1, 150),
    format=st.sampled_from(["int4", "nf4", "fp4"]),
    double_quant=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_memory_stats_count_what_is_held_and_save_over_70_percent(
    d_out: int, d_in: int, format: str, double_quant: bool
) -> None:
    layer = QLoRALayer(torch.ones(d_out, d_in), 1, format=format, double_quant=double_quant)
    stats = layer.memory_stats()
    assert stats.base_unquantized_bytes == 4 * d_out * d_in
    assert stats.base_quantized_bytes == sum(p.untyped_storage().nbytes() for p in layer.base.parameters())
    assert stats.lora_bytes == 4 * (d_out + d_in)
    assert stats.total_bytes == sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert stats.compression_ratio == stats.base_unquantized_bytes / stats.base_quantized_bytes
    if d_out * d_in >= 256:
        assert stats.compression_ratio > 6
        assert 1 - stats.base_quantized_bytes / stats.base_unquantized_bytes > 0.7


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_base_that_is_not_finite_is_an_error(odd: float) -> None:
    weight = random(12, 10)
    weight[7, 3] = odd
    with pytest.raises(InputError, match="NaN or an infinity"):
        QLoRALayer(weight, rank=3)


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'nf5'.*nf4"):
        QLoRALayer(random(12, 10), rank=3, format="nf5")


def _replace_b(layer: QLoRALayer) -> None:
    layer.lora_b = torch.nn.Parameter(random(*layer.lora_b.shape, seed=4))


def _move_b(layer: QLoRALayer) -> None:
    layer.lora_b.data = layer.lora_b.data * 3


def _halve_a(layer: QLoRALayer) -> None:
    layer.lora_a.data = layer.lora_a.data.half()


def _read_b_otherwise(layer: QLoRALayer) -> None:
    """The same address, another dtype and stride: every second number is a lower half, which is 0."""
    layer.lora_b.data.copy_(layer.lora_b.data.bfloat16())
    layer.lora_b.data = layer.lora_b.data.view(torch.bfloat16)[:, : layer.rank]


def _scale(layer: QLoRALayer) -> None:
    layer.scale = 0.25


CHANGES = [
    lambda layer: layer.lora_b.data.mul_(2), lambda layer: layer.set_base(random(64, 96, seed=3)),
    _replace_b, _move_b, _read_b_otherwise, _halve_a, _scale,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_from_call_to_call_follows_every_change(change: Callable[[QLoRALayer], object]) -> None:
    """The native view of a layer is made once; after a change it is that of a layer that never ran."""
    layer, x = trained_layer(64, 96), random(40, 96, dtype=torch.bfloat16)
    before = layer(x)
    change(layer)
    fresh = QLoRALayer(layer.base_weight_quantized, layer.rank, layer.alpha)
    fresh.lora_a, fresh.lora_b, fresh.scale = layer.lora_a, layer.lora_b, layer.scale
    assert torch.equal(layer(x), fresh(x))
    assert not torch.equal(layer(x), before)


def test_a_copy_of_a_layer_that_ran_has_its_own_memory() -> None:
    layer, x = trained_layer(64, 96), random(40, 96, dtype=torch.bfloat16)
    expected = layer(x)
    other = copy.deepcopy(layer)
    layer.lora_b.data.zero_()
    assert torch.equal(other(x), expected)
