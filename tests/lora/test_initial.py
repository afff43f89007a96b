"""PiSSA and LoftQ: base and factors together are the weight, and come closer to it than a quantized base alone."""

import pytest
import torch
from torch import nn

from entrenar.core.errors import InputError
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.lora.initial import get_initial
from entrenar.lora.low_rank import AdapterLayer
from entrenar.quant.tensor import quantize

W = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -1, 64))


def model_of(*, quantized: bool) -> nn.Sequential:
    linear = nn.Linear(64, 48, bias=False)
    linear.weight.data.copy_(W)
    return nn.Sequential(QuantizedLinear(quantize(W, format="nf4")) if quantized else linear)


def started(init: str, *, quantized: bool, **changes: object) -> tuple[nn.Sequential, AdapterLayer]:
    model = model_of(quantized=quantized)
    attach_lora(model, rank=8, alpha=12, init=init, original=lambda name: W, **changes)  # pyright: ignore[reportArgumentType]
    ((_, layer),) = adapted_layers(model)
    return model, layer


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_leaves_the_model_as_it_was(init: str, rslora: bool) -> None:
    _, layer = started(init, quantized=False, rslora=rslora)
    assert torch.allclose(layer.merge_to_f32(), W, atol=1e-5)
    u, s, vh = torch.linalg.svd(W)
    best = (u[:, :8] * s[:8]) @ vh[:8]
    assert (layer.scale * layer.lora_b @ layer.lora_a - best).norm() < 0.02 * best.norm()


@pytest.mark.parametrize("init", ["pissa", "loftq", "loftq_1"])
def test_the_start_is_closer_to_the_weight_than_nf4_alone(init: str) -> None:
    _, layer = started(init, quantized=True)
    plain = (quantize(W, format="nf4").dequantize() - W).norm()
    assert (layer.merge_to_f32() - W).norm() < 0.95 * plain


def test_more_steps_of_loftq_are_never_worse() -> None:
    errors = [(started(f"loftq_{n}", quantized=True)[1].merge_to_f32() - W).norm().item() for n in (1, 3, 6)]
    assert errors == sorted(errors, reverse=True)


def test_a_quantized_base_without_its_original_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot adapt 0: .*original_weights"):
        attach_lora(model_of(quantized=True), rank=4, init="pissa")


def test_alpha_0_leaves_nothing_to_start_with() -> None:
    with pytest.raises(InputError, match="alpha is 0"):
        attach_lora(model_of(quantized=False), rank=4, alpha=0, init="pissa")


@pytest.mark.parametrize("name", ["pisa", "default_3", "pissa_4"])
def test_an_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(InputError, match=r"default, gaussian, pissa, pissa_niter, loftq"):
        get_initial(name)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "loftq"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_a_saved_adapter_makes_its_base_again(tmp_path: object, init: str, quantized: bool, dora: bool) -> None:
    model, layer = started(init, quantized=quantized, dora=dora)
    nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, f"{tmp_path}/adapter")
    again = model_of(quantized=quantized)
    load_adapter(again, f"{tmp_path}/adapter", original=lambda name: W)
    x = torch.randn(3, 64)
    assert torch.equal(again(x), model(x))


def test_as_plain_lora_it_stands_on_the_original(tmp_path: object) -> None:
    model, layer = started("pissa", quantized=False, rslora=True)
    nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, f"{tmp_path}/plain", plain=True)
    again = model_of(quantized=False)
    load_adapter(again, f"{tmp_path}/plain")
    ((_, other),) = adapted_layers(again)
    assert (other.rank, other.scale) == (16, 1.0)
    assert torch.allclose(other.merge_to_f32(), layer.merge_to_f32(), atol=1e-5)
