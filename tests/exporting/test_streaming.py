"""Fusing without a model gives what the live model's layers give, for every variant, and says what survived."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.opening.original import original_weights
from entrenar.recipes.export import export

IDS = torch.tensor([[1, 40, 80, 120, 7, 9, 200]])
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True, "rank_pattern": {"q_proj": 2}},
    "pissa": {"init": "pissa"},
    "loftq": {"init": "loftq_2"},
    "head": {"targets": ["lm_head", "q_proj"]},
    "embedding": {"targets": ["embed_tokens", "q_proj"]},
    "saved": {"modules_to_save": ["embed_tokens"]},
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def trained(directory: Path, adapter: Path, quantize: str, **changes: Any) -> PreTrainedModel:
    """A model with an adapter that moved its weights by about a percent; the adapter is saved."""
    torch.manual_seed(0)
    model, _ = load(str(directory), quantize, dtype="float32")
    attach_lora(model, rank=4, alpha=4, original=original_weights(str(directory)), **changes)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.01
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_b, std=0.004)
    save_adapter(model, adapter)
    return model.eval()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_written_model_is_the_live_one(tiny_model_dir: Path, tmp_path: Path, name: str, quantize: str) -> None:
    live = trained(tiny_model_dir, tmp_path / "adapter", quantize, **VARIANTS[name])
    path = export(str(tiny_model_dir), tmp_path / "out", adapter=str(tmp_path / "adapter"), type="f32")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(live), atol=2e-5, rtol=1e-4)
    report = json.loads((path / "fidelity.json").read_text())
    assert report["survival"] == pytest.approx(1, abs=1e-3)
    assert len(report["modules"]) == len(list(adapted_layers(live)))


def test_four_bits_of_the_original_keep_the_change(tiny_model_dir: Path, tmp_path: Path) -> None:
    trained(tiny_model_dir, tmp_path / "adapter", "nf4")
    path = export(str(tiny_model_dir), tmp_path / "out", adapter=str(tmp_path / "adapter"), type="nf4")
    report = json.loads((path / "fidelity.json").read_text())
    assert report["base"] == "original"
    assert report["survival"] == pytest.approx(1, abs=0.2)  # tiny weights: the format's own noise takes part
    stored = load_file(path / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4" in stored


def test_four_bits_of_a_dequantized_base_are_refused_with_the_share(tiny_model_dir: Path, tmp_path: Path) -> None:
    trained(tiny_model_dir, tmp_path / "adapter", "nf4")
    options: dict[str, Any] = {"adapter": str(tmp_path / "adapter"), "type": "nf4", "base": "dequantized"}
    with pytest.raises(InputError, match=r"would keep about -?\d+\.\d% .*ask for lossy"):
        export(str(tiny_model_dir), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    path = export(str(tiny_model_dir), tmp_path / "out", lossy=True, **options)
    assert (path / "fidelity.json").is_file()


def test_text_measures_the_written_model_against_the_live_one(
    tiny_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    trained(tiny_model_dir, tmp_path / "adapter", "nf4")
    adapter = str(tmp_path / "adapter")
    path = export(str(tiny_model_dir), tmp_path / "out", adapter=adapter, type="bf16", text=str(tiny_data))
    text = json.loads((path / "fidelity.json").read_text())["text"]
    assert 0 <= text["kl"] < 1e-2
    assert text["written_loss"] == pytest.approx(text["live_loss"], abs=0.02)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"base": "other"}, "no base 'other': choose dequantized or original"),
        ({"to": "gguf", "lossy": True}, "are for safetensors"),
    ],
)
def test_a_wrong_choice_is_one_sentence(
    tiny_model_dir: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        export(str(tiny_model_dir), tmp_path / "out", **options)


def test_an_adapter_for_another_base_names_what_does_not_fit(
    tiny_model_dir: Path, tmp_path: Path, smollm2: Path
) -> None:
    trained(tiny_model_dir, tmp_path / "adapter", "none")
    with pytest.raises(InputError, match=r"has no factors for 196 layers .*for another model"):
        export(str(smollm2), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()
