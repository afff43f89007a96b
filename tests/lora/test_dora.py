"""DoRA: a fresh layer changes nothing, row lengths are the magnitudes, and gradients are those of the closed form."""

import pytest
import torch
from torch import Tensor, nn

from entrenar.layers.quantized_linear import can_join
from entrenar.lora.dora import DoRALayer
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.qlora_layer import QLoRALayer

W = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
KINDS = pytest.mark.parametrize("kind", [LoRALayer, QLoRALayer])


def layer_of(kind: type[LoRALayer] | type[QLoRALayer], *, moved: bool = True, dropout: float = 0.0) -> DoRALayer:
    torch.manual_seed(3)
    layer = DoRALayer(kind(W, rank=3, alpha=6, dropout=dropout, bias=torch.linspace(-1, 1, 12)))
    if moved:
        nn.init.normal_(layer.lora_b, std=0.3)
        layer.lora_magnitude.data *= torch.linspace(0.5, 2, 12)
    return layer.eval()


def closed_form(layer: DoRALayer, x: Tensor) -> Tensor:
    """Equation 5, the norm a constant."""
    whole = layer.base_to_f32() + layer.scale * layer.lora_b @ layer.lora_a
    stretched = whole * (layer.lora_magnitude / whole.detach().norm(dim=1))[:, None]
    return x @ stretched.t() + torch.linspace(-1, 1, 12)


@KINDS
def test_a_fresh_layer_changes_nothing(kind: type[LoRALayer] | type[QLoRALayer]) -> None:
    layer = layer_of(kind, moved=False)
    assert torch.allclose(layer(X), layer.plain(X), atol=1e-5)


@KINDS
def test_forward_and_gradients_are_the_closed_forms(kind: type[LoRALayer] | type[QLoRALayer]) -> None:
    layer = layer_of(kind)
    x, other = X.clone().requires_grad_(), X.clone().requires_grad_()
    parameters = [layer.lora_a, layer.lora_b, layer.lora_magnitude]
    y, expected = layer(x), closed_form(layer, other)
    assert torch.allclose(y, expected, atol=1e-4)
    found = torch.autograd.grad(y.square().sum(), [x, *parameters])
    wanted = torch.autograd.grad(expected.square().sum(), [other, *parameters])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(found, wanted, strict=True))


@KINDS
def test_rows_of_the_fused_weight_have_the_trained_length(kind: type[LoRALayer] | type[QLoRALayer]) -> None:
    layer = layer_of(kind)
    assert torch.allclose(layer.merge_to_f32().norm(dim=1), layer.lora_magnitude, rtol=1e-5)
    bias = torch.linspace(-1, 1, 12)
    assert torch.allclose(nn.functional.linear(X, layer.merge_to_f32(), bias), layer(X), atol=1e-4)


def test_it_never_joins_the_native_blocks() -> None:
    assert not can_join(layer_of(LoRALayer))
    assert can_join(LoRALayer(W, rank=2))


def test_dropout_acts_on_what_the_adapter_adds_only_while_training() -> None:
    layer = layer_of(LoRALayer, dropout=0.5)
    assert torch.equal(layer(X), layer(X))
    layer.train()
    assert not torch.equal(layer(X), layer(X))
