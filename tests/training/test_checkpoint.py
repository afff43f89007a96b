"""Checkpoints: complete or not there, checked against their manifest, newest valid one wins."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.data.batches import micro_batches
from entrenar.data.dataset import PreparedData
from entrenar.files.peft import WEIGHTS_NAME
from entrenar.lora.attach import adapted_layers
from entrenar.optim.adamw import make_adamw
from entrenar.training.checkpoint import drop_older, latest_checkpoint, load_checkpoint, save_checkpoint
from entrenar.training.state import State
from entrenar.training.step import update


def optimizer_of(model: PreTrainedModel) -> torch.optim.AdamW:
    factors = [factor for _, layer in adapted_layers(model) for factor in (layer.lora_a, layer.lora_b)]
    return make_adamw(factors, 1e-2, (0.9, 0.999), 1e-8, 0.0)


def test_loading_puts_adapter_optimizer_and_counters_back(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    optimizer, batches = optimizer_of(tiny_qlora), micro_batches(tiny_prepared.train.examples[:4], 4, 0)
    update(tiny_qlora, optimizer, batches, 1e-2, 1.0)
    state = State("data", step=1, batch=2, tokens=7, best_loss=0.5)
    save_checkpoint(tmp_path, "step-1", tiny_qlora, optimizer, state)
    update(tiny_qlora, optimizer, batches, 1e-2, 1.0)
    expected = [layer.lora_a.detach().clone() for _, layer in adapted_layers(tiny_qlora)]
    fresh = optimizer_of(tiny_qlora)
    assert load_checkpoint(tmp_path / "step-1", tiny_qlora, fresh, "data") == state
    update(tiny_qlora, fresh, batches, 1e-2, 1.0)
    got = [layer.lora_a.detach() for _, layer in adapted_layers(tiny_qlora)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_damaged_checkpoint_is_passed_over(tiny_qlora: PreTrainedModel, tmp_path: Path) -> None:
    for step in (9, 10):
        save_checkpoint(tmp_path, f"step-{step}", tiny_qlora, optimizer_of(tiny_qlora), State("data", step=step))
    assert latest_checkpoint(tmp_path) == tmp_path / "step-10"
    weights = tmp_path / "step-10" / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-9"
    (tmp_path / "step-9" / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(tiny_qlora: PreTrainedModel, tmp_path: Path) -> None:
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, f"step-{step}", tiny_qlora, optimizer_of(tiny_qlora), State("data", step=step))
    drop_older(tmp_path, "step", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-4"]


def test_other_data_is_refused(tiny_qlora: PreTrainedModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "step-1", tiny_qlora, optimizer_of(tiny_qlora), State("these rows", step=1))
    with pytest.raises(InputError, match="trained on other data"):
        load_checkpoint(tmp_path / "step-1", tiny_qlora, optimizer_of(tiny_qlora), "other rows")
