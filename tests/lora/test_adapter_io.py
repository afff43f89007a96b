"""Adapters of a model to a PEFT directory and back, strictly."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.files.peft import BaseFormat, read_base_format
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.lora.tensors import adapter_tensors, set_tensors
from entrenar.quant.tensor import quantize

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))


def block() -> nn.Sequential:
    return nn.Sequential(OrderedDict(up=nn.Linear(16, 24), act=nn.SiLU(), down=nn.Linear(24, 16)))


def base_model(*, quantized: bool = False) -> nn.Sequential:
    """Two blocks with the same weights on every call."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(first=block(), second=block()))
    for name, layer in list(model.named_modules()) if quantized else []:
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            weight = quantize(layer.weight, format="int4", block_size=32, double_quant=True)
            setattr(model.get_submodule(parent), child, QuantizedLinear(weight, layer.bias))
    return model


def trained_model(targets: str | list[str] = "all-linear", *, quantized: bool = False) -> nn.Sequential:
    model = base_model(quantized=quantized)
    attach_lora(model, rank=3, alpha=12, dropout=0.125, targets=targets)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_b)
    return model.eval()


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in directory.rglob("*")}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["up"], ["second.down"], r"first\..*"])
def test_a_loaded_adapter_gives_the_same_output(tmp_path: Path, targets: str | list[str], quantized: bool) -> None:
    model = trained_model(targets, quantized=quantized)
    save_adapter(model, tmp_path / "adapter")
    again = base_model(quantized=quantized)
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(X), model(X))
    assert not torch.equal(again(X), base_model(quantized=quantized)(X))
    assert [(n, la.rank, la.scale, la.dropout) for n, la in adapted_layers(again)] == [
        (n, 3, 4.0, 0.125) for n, _ in adapted_layers(model)
    ]


def test_the_file_holds_each_factor_under_pefts_key(tmp_path: Path) -> None:
    model = trained_model(["up"])
    save_adapter(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected: dict[str, Tensor] = {}
    for name in ("first.up", "second.up"):
        layer = dict(adapted_layers(model))[name]
        expected[f"base_model.model.{name}.lora_A.weight"] = layer.lora_a
        expected[f"base_model.model.{name}.lora_B.weight"] = layer.lora_b
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], value) for key, value in expected.items())


@pytest.mark.parametrize("targets", ["all-linear", ["up"], ["second.down"], r"first\..*"])
def test_the_configs_targets_select_the_adapted_layers_and_no_other(tmp_path: Path, targets: str | list[str]) -> None:
    """By peft's rule for a list: the whole name, or its end after a dot."""
    model = trained_model(targets)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    linear = [name for name, module in base_model().named_modules() if isinstance(module, nn.Linear)]
    selected = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in config["target_modules"])]
    assert selected == [name for name, _ in adapted_layers(model)]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 12, 0.125)


def test_the_file_notes_how_a_quantized_base_was_held(tmp_path: Path) -> None:
    save_adapter(trained_model(quantized=True), tmp_path / "quantized")
    save_adapter(trained_model(), tmp_path / "float")
    expected = BaseFormat(format="int4", block_size=32, double_quant=True)
    assert read_base_format(tmp_path / "quantized") == expected
    assert read_base_format(tmp_path / "float") is None


def test_a_model_without_adapters_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapters to save"):
        save_adapter(base_model(), tmp_path / "adapter")
    assert tree(tmp_path) == {}


def test_an_existing_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    save_adapter(trained_model(["up"]), tmp_path / "adapter")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="already exists"):
        save_adapter(trained_model(), tmp_path / "adapter")
    assert tree(tmp_path) == before


def test_an_adapter_for_other_layers_names_them(tmp_path: Path) -> None:
    save_adapter(trained_model(), tmp_path / "adapter")
    model = nn.Sequential(OrderedDict(first=block()))
    with pytest.raises(InputError, match=r"does not have: second\.down, second\.up"):
        load_adapter(model, tmp_path / "adapter")
    assert list(adapted_layers(model)) == []


def test_an_adapter_of_another_shape_names_the_layer_and_both_shapes(tmp_path: Path) -> None:
    save_adapter(trained_model(["up"]), tmp_path / "adapter")
    model = base_model()
    model.second = nn.Sequential(OrderedDict(up=nn.Linear(20, 24)))
    with pytest.raises(InputError, match=r"\(3, 16\), .* at second\.up, where the model needs \(\(3, 20\)"):
        load_adapter(model, tmp_path / "adapter")


def test_loading_onto_a_model_with_adapters_is_an_error(tmp_path: Path) -> None:
    model = trained_model()
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(InputError, match="adapters attached already"):
        load_adapter(model, tmp_path / "adapter")


def test_tensors_are_views_of_the_live_parameters() -> None:
    model = trained_model(["up"])
    layers = adapter_tensors(model).layers
    for name, layer in adapted_layers(model):
        assert [t.data_ptr() for t in layers[name].values()] == [layer.lora_a.data_ptr(), layer.lora_b.data_ptr()]
        assert not any(t.requires_grad for t in layers[name].values())


def test_set_tensors_copies_and_keeps_the_parameters() -> None:
    model, other = trained_model(), trained_model()
    ids = [id(p) for p in model.parameters()]
    set_tensors(dict(model.named_modules()), adapter_tensors(other), "elsewhere")
    other_output = other(X)
    for tensor in (t for parts in adapter_tensors(other).layers.values() for t in parts.values()):
        tensor.zero_()
    assert torch.equal(model(X), other_output)
    assert [id(p) for p in model.parameters()] == ids


@pytest.mark.parametrize(("ours", "theirs"), [("all-linear", ["up"]), (["up"], "all-linear")])
def test_tensors_must_be_for_exactly_the_adapted_layers(ours: str | list[str], theirs: str | list[str]) -> None:
    model = trained_model(ours)
    before = model(X)
    with pytest.raises(InputError, match=r"checkpoint and the model do not adapt the same layers: .*down"):
        set_tensors(dict(model.named_modules()), adapter_tensors(trained_model(theirs)), "checkpoint")
    assert torch.equal(model(X), before)
