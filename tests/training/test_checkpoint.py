"""Checkpoints: complete or not there, checked against their manifest, newest valid one wins."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.data.batches import micro_batches
from entrenar.data.dataset import PreparedData
from entrenar.files.peft import WEIGHTS_NAME
from entrenar.lora.attach import adapted_layers
from entrenar.optim.adamw import make_adamw
from entrenar.training.checkpoint import (
    drop_older,
    drop_unneeded_best,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from entrenar.training.state import State
from entrenar.training.step import update
from tests.support.learning import learner


def optimizer_of(model: PreTrainedModel) -> torch.optim.AdamW:
    factors = [factor for _, layer in adapted_layers(model) for factor in (layer.lora_a, layer.lora_b)]
    return make_adamw(factors, 1e-2, (0.9, 0.999), 1e-8, 0.0)


def test_loading_puts_adapter_optimizer_and_counters_back(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    optimizer, batches = optimizer_of(tiny_qlora), micro_batches(tiny_prepared.train.examples[:4], 4, 0)
    update(learner(tiny_qlora, optimizer), batches, 1e-2, 1.0)
    state = State("data", step=1, batch=2, tokens=7, best_loss=0.5)
    save_checkpoint(tmp_path, "step-1", tiny_qlora, optimizer, state)
    update(learner(tiny_qlora, optimizer), batches, 1e-2, 1.0)
    expected = [layer.lora_a.detach().clone() for _, layer in adapted_layers(tiny_qlora)]
    fresh = optimizer_of(tiny_qlora)
    assert load_checkpoint(tmp_path / "step-1", tiny_qlora, fresh, "data") == state
    update(learner(tiny_qlora, fresh), batches, 1e-2, 1.0)
    got = [layer.lora_a.detach() for _, layer in adapted_layers(tiny_qlora)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def momentum_of(model: PreTrainedModel) -> torch.optim.SGD:
    """An optimiser whose state is made in its first step."""
    factors = [factor for _, layer in adapted_layers(model) for factor in (layer.lora_a, layer.lora_b)]
    return torch.optim.SGD(factors, lr=1e-2, momentum=0.9)


def test_state_that_is_made_in_the_first_step_is_put_back_too(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    optimizer, batches = momentum_of(tiny_qlora), micro_batches(tiny_prepared.train.examples[:4], 4, 0)
    update(learner(tiny_qlora, optimizer), batches, 1e-2, 1.0)
    save_checkpoint(tmp_path, "step-1", tiny_qlora, optimizer, State("data", step=1))
    update(learner(tiny_qlora, optimizer), batches, 1e-2, 1.0)
    expected = [layer.lora_a.detach().clone() for _, layer in adapted_layers(tiny_qlora)]
    fresh = momentum_of(tiny_qlora)
    load_checkpoint(tmp_path / "step-1", tiny_qlora, fresh, "data")
    update(learner(tiny_qlora, fresh), batches, 1e-2, 1.0)
    got = [layer.lora_a.detach() for _, layer in adapted_layers(tiny_qlora)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1e-2, momentum=0.9)
    with pytest.raises(InputError, match="has another optimizer's state"):
        load_checkpoint(tmp_path / "step-1", tiny_qlora, other, "data")


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


def saved(model: PreTrainedModel, directory: Path, step: int, best: int = 0) -> Path:
    save_checkpoint(directory, f"step-{step}", model, optimizer_of(model), State("data", step=step, best_step=best))
    return directory / f"step-{step}"


def sign(path: Path) -> None:
    """Make the manifest agree with what lies there."""
    names = (WEIGHTS_NAME, "optimizer.safetensors", "state.json")
    manifest = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "manifest",
    [{}, [], None, {"state.json": 3}, {"../../secret": "0"}, {"state.json": "0"}, {"/dev/zero": "0"}, "not JSON"],
)
def test_a_manifest_that_is_not_of_the_three_files_is_passed_over(
    tiny_qlora: PreTrainedModel, tmp_path: Path, manifest: object
) -> None:
    saved(tiny_qlora, tmp_path, 1)
    newest = saved(tiny_qlora, tmp_path, 2)
    text = manifest if manifest == "not JSON" else json.dumps(manifest)
    (newest / "manifest.json").write_text(str(text))
    assert latest_checkpoint(tmp_path) == tmp_path / "step-1"


def test_a_named_pipe_in_a_checkpoint_is_not_waited_for(tiny_qlora: PreTrainedModel, tmp_path: Path) -> None:
    for name in ("state.json", "manifest.json", WEIGHTS_NAME):
        path = saved(tiny_qlora, tmp_path, 2)
        (path / name).unlink()
        os.mkfifo(path / name)
        assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [{"step": "2"}, {"step": None}, {"best_loss": "low"}, {"pending": 3}, {"fingerprint": 1}, {"loss_scale": []}],
)
def test_a_state_of_other_types_is_passed_over(
    tiny_qlora: PreTrainedModel, tmp_path: Path, change: dict[str, object]
) -> None:
    path = saved(tiny_qlora, tmp_path, 2)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(values | change))
    sign(path)
    assert latest_checkpoint(tmp_path) is None


def test_an_optimizer_of_other_tensors_is_refused(tiny_qlora: PreTrainedModel, tmp_path: Path) -> None:
    path = saved(tiny_qlora, tmp_path, 2)
    tensors = load_file(path / "optimizer.safetensors")
    for change in ({"other|exp_avg": torch.zeros(2)}, {next(iter(tensors)): torch.zeros(7, 7)}):
        save_file(tensors | change, path / "optimizer.safetensors")
        with pytest.raises(InputError, match="another optimizer's state"):
            load_checkpoint(path, tiny_qlora, optimizer_of(tiny_qlora), "data")
    (path / "optimizer.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"optimizer\.safetensors cannot be read"):
        load_checkpoint(path, tiny_qlora, optimizer_of(tiny_qlora), "data")


def test_other_weights_below_the_adapter_are_refused(tiny_qlora: PreTrainedModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "step-1", tiny_qlora, optimizer_of(tiny_qlora), State("data", "these weights", step=1))
    with pytest.raises(InputError, match="trained over another base"):
        load_checkpoint(tmp_path / "step-1", tiny_qlora, optimizer_of(tiny_qlora), "data", "others")


def test_the_best_that_a_checkpoint_goes_back_to_is_kept(tiny_qlora: PreTrainedModel, tmp_path: Path) -> None:
    optimizer = optimizer_of(tiny_qlora)
    for step in (2, 3, 5):
        save_checkpoint(tmp_path, f"best-{step}", tiny_qlora, optimizer, State("data", step=step))
    saved(tiny_qlora, tmp_path, 4, best=3)
    drop_unneeded_best(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-3", "best-5", "step-4"]


def test_a_checkpoint_without_its_best_is_passed_over_where_that_is_wanted(
    tiny_qlora: PreTrainedModel, tmp_path: Path
) -> None:
    older, newest = saved(tiny_qlora, tmp_path, 2), saved(tiny_qlora, tmp_path, 4, best=3)
    assert latest_checkpoint(tmp_path) == newest
    assert latest_checkpoint(tmp_path, with_best=True) == older


def test_a_link_among_the_checkpoints_is_removed_and_what_it_points_to_stays(
    tiny_qlora: PreTrainedModel, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / "step-1").symlink_to(tmp_path / "mine")
    (directory / "step-²").mkdir()  # a digit, and no number
    saved(tiny_qlora, directory, 2)
    drop_older(directory, "step", keep=1)
    assert sorted(path.name for path in directory.iterdir()) == ["step-2", "step-²"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
