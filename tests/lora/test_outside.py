"""Layers whose weight the architecture reads outside them: Mamba's, Falcon's sums in place, quantized ones."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.attach import attach_lora
from entrenar.lora.dora import DoRALayer
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.qlora_layer import QLoRALayer
from entrenar.quant.tensor import quantize
from tests.support.families import make_family

W = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(5, 25)[None]


def tiny(kind: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(shape | changes)), dtype=torch.float32)


@pytest.mark.parametrize(("kind", "words"), [("mamba", {"in_proj", "x_proj"}), ("falcon_mamba", {"in_proj", "x_proj"})])
def test_all_linear_leaves_out_what_mamba_reads_outside_and_trains(kind: str, words: set[str]) -> None:
    model = tiny(kind)
    assert {name.rpartition(".")[2] for name in attach_lora(model, rank=2)} == words
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad is not None for grad in trained)


@pytest.mark.parametrize(("kind", "target"), [("mamba", "out_proj"), ("mamba", "dt_proj"), ("jamba", "dt_proj")])
def test_such_a_layer_is_refused_where_it_is_named(kind: str, target: str) -> None:
    model = make_family(kind) if kind == "jamba" else tiny(kind)
    with pytest.raises(InputError, match=rf"{target}.*{kind} model cannot be adapted"):
        attach_lora(model, rank=2, targets=[target])


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_a_quantized_layer_gives_its_weight_to_mamba(kind: str) -> None:
    """Against the same model whose weights were quantized and are held dequantized."""
    model, plain = tiny(kind), tiny(kind)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and module.in_features >= 16:
            packed = quantize(module.weight, format="nf4", block_size=16)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(packed, module.bias))
            plain.get_submodule(name).weight = nn.Parameter(packed.dequantize())
    with torch.no_grad():
        expected, found = (m.eval()(input_ids=IDS, use_cache=False).logits for m in (plain, model))
    torch.testing.assert_close(found, expected)


def test_falcon_which_adds_in_place_trains() -> None:
    model = tiny("falcon", num_attention_heads=2, alibi=False)
    attach_lora(model, rank=2)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [LoRALayer, QLoRALayer, lambda w, rank: DoRALayer(LoRALayer(w, rank))])
def test_an_adapted_layers_weight_says_what_it_is_and_refuses_to_compute(make: Any) -> None:
    layer = make(W, rank=2)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (W.shape, W.dtype, W.device)
    assert (layer.in_features, layer.out_features, layer.bias) == (32, 16, None)
    assert torch.ones(3).to(weight.dtype).dtype == weight.dtype
    with pytest.raises(InputError, match=r"\(16 × 32\) outside the layer"):
        nn.functional.linear(torch.ones(3, 32), weight)


def test_a_quantized_layers_weight_computes() -> None:
    layer = QuantizedLinear(quantize(W, format="int8", block_size=32))
    x = torch.randn(3, 32, requires_grad=True)
    torch.testing.assert_close(x @ layer.weight.t(), layer(x))
    (x @ layer.weight.t()).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(3, -1))
