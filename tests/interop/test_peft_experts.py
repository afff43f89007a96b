"""Adapters over a mixture's experts: peft's directory both ways, its numbers and gradients, its merged weights."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.recipes.export import export
from entrenar.recipes.train import train
from tests.support.mixtures import MIXTURES, save_mixture

pytestmark = pytest.mark.interop
TARGETS = [["down_proj"], ["gate_up_proj"], ["gate_up_proj", "down_proj"]]


@pytest.fixture(params=MIXTURES)
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    save_mixture(request.param, tmp_path / "base", tiny_tokenizer)
    return tmp_path / "base"


def ids() -> Tensor:
    return torch.randint(0, 300, (2, 29), generator=torch.Generator().manual_seed(1))


def their_model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager")


def randomize(parameters: Any) -> None:
    for index, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))


def their_adapter(base: Path, parameters: list[str], directory: Path) -> Any:
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=[f"experts.{name}" for name in parameters]
    )
    model = peft.get_peft_model(their_model(base), config)
    randomize(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    model.save_pretrained(str(directory))
    return model.eval()


@pytest.mark.parametrize("parameters", TARGETS, ids=str)
def test_an_adapter_of_peft_gives_its_logits_and_gradients(base: Path, tmp_path: Path, parameters: list[str]) -> None:
    theirs = their_adapter(base, parameters, tmp_path / "adapter")
    ours, _ = load(str(base), "none", dtype="float32")
    load_adapter(ours, tmp_path / "adapter")
    for model in (ours, theirs):
        model(input_ids=ids(), labels=ids()).loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)
    found = {name: layer for name, layer in adapted_layers(ours) if "experts" in name}
    assert {name.rpartition(".")[2] for name in found} == set(parameters)
    for name, layer in found.items():
        module, _, leaf = name.rpartition(".")
        depth = 1 if leaf == "gate_up_proj" and len(parameters) == 2 else 0
        peer = theirs.base_model.model.get_submodule(module + ".base_layer" * depth)
        for own, other in ((layer.lora_a, peer.lora_A), (layer.lora_b, peer.lora_B)):
            torch.testing.assert_close(own.grad, other["default"].weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parameters", TARGETS, ids=str)
def test_an_adapter_of_ours_is_loaded_by_peft(base: Path, tmp_path: Path, parameters: list[str]) -> None:
    ours, _ = load(str(base), "none", dtype="float32")
    attach_lora(ours, rank=3, alpha=6, targets=["q_proj", *(f"experts.{name}" for name in parameters)])
    randomize(p for _, p in sorted(ours.named_parameters()) if p.requires_grad)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(their_model(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-4, atol=1e-4)
    again, _ = load(str(base), "none", dtype="float32")
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, ours(ids()).logits)


@pytest.mark.parametrize("parameters", TARGETS, ids=str)
def test_fusing_gives_the_weights_that_peft_merges(base: Path, tmp_path: Path, parameters: list[str]) -> None:
    merged = their_adapter(base, parameters, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    export(str(base), tmp_path / "ours", adapter=str(tmp_path / "adapter"), type="f32")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-5)
    report = json.loads((tmp_path / "ours" / "fidelity.json").read_text())
    assert report["survival"] == pytest.approx(1, abs=1e-4)


def test_a_run_over_a_quantized_mixture_is_fused_and_opened_by_transformers(
    base: Path, tmp_path: Path, make_config: Any
) -> None:
    targets = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    changes = {"model.path": str(base), "lora.dropout": 0.0, "lora.targets": targets, "model.quantize": "nf4"}
    result = train(make_config(**changes))
    assert result.train_loss is not None
    export(str(base), tmp_path / "fused", adapter=result.adapter, type="f32")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    live, _ = load(str(base), "nf4", dtype="float32")
    load_adapter(live, result.adapter)
    with torch.no_grad():
        torch.testing.assert_close(fused(ids()).logits, live(ids()).logits, rtol=1e-3, atol=1e-3)
