"""Verification says how far each step of an export is from the live model."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from entrenar.core.errors import InputError
from entrenar.evaluation.fidelity import ExportStep, fidelity
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.recipes.export import export

MakeGGUF = Callable[..., Path]


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> str:
    model, _ = load(str(tiny_model_dir), "nf4", dtype="float32")
    attach_lora(model, rank=4)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_b, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    return str(tmp_path / "adapter")


def steps_of(model: Path, adapter: str | None, output: Path, type: str, text: Path | None = None) -> list[ExportStep]:
    found: list[ExportStep] = []
    export(str(model), output, adapter=adapter, to="gguf", type=type, on_verified=found.extend, verify_on=text)
    assert output.is_file()
    return found


def test_the_more_bits_the_nearer(tiny_model_dir: Path, adapter: str, tmp_path: Path) -> None:
    kl = {}
    for type in ("f32", "q8_0", "q4_0"):
        live, fused, quantized = steps_of(tiny_model_dir, adapter, tmp_path / f"{type}.gguf", type)
        assert [step.step for step in (live, fused, quantized)] == ["live", "fused", "quantized"]
        assert live.kl == 0
        assert abs(fused.kl) < 1e-6
        assert math.isclose(fused.perplexity, live.perplexity, rel_tol=1e-4)
        kl[type] = quantized.kl
    assert abs(kl["f32"]) < 1e-6 < kl["q8_0"] < 1e-2 < kl["q4_0"]


def test_a_model_without_an_adapter_can_be_verified_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    live, _, quantized = steps_of(tiny_model_dir, None, tmp_path / "m.gguf", "f16")
    assert 0 < quantized.kl < 1e-4
    assert math.isclose(live.perplexity, quantized.perplexity, rel_tol=1e-2)


def test_held_out_text_may_be_named(tiny_model_dir: Path, adapter: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Please switch on the lamp. " * 4)
    other = steps_of(tiny_model_dir, adapter, tmp_path / "a.gguf", "f16", tmp_path / "text.txt")
    assert other[0].perplexity != steps_of(tiny_model_dir, adapter, tmp_path / "b.gguf", "f16")[0].perplexity
    (tmp_path / "short.txt").write_text("")
    with pytest.raises(InputError, match="has 0 tokens"):
        steps_of(tiny_model_dir, adapter, tmp_path / "c.gguf", "f16", tmp_path / "short.txt")
    with pytest.raises(InputError, match=r"cannot read the text .*nowhere"):
        steps_of(tiny_model_dir, adapter, tmp_path / "d.gguf", "f16", tmp_path / "nowhere")


def test_fidelity_is_the_divergence_and_the_perplexity_of_their_definitions() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = fidelity("a step", p.log(), q.log(), torch.tensor([0, 1]))
    assert math.isclose(found.kl, 0.5 * math.log(2) - 0.25 * math.log(2), rel_tol=1e-5)
    assert math.isclose(found.perplexity, 2.0, rel_tol=1e-5)
