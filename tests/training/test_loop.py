"""The loop: it learns, logs, stops early at the best adapter, and gives up on a diverged run."""

import dataclasses
import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from entrenar.core.errors import EntrenarError, StoppedError
from entrenar.core.run_log import read_metrics
from entrenar.data.dataset import PreparedData
from entrenar.evaluation.perplexity import perplexity
from entrenar.lora.attach import adapted_layers, attach_lora, trained_parameters
from entrenar.models.forward import target_loss
from entrenar.objectives import supervised
from entrenar.opening.load import load
from entrenar.optim.adamw import make_adamw
from entrenar.optim.schedule import learning_rate_factor
from entrenar.training import loop
from entrenar.training.checkpoint import latest_checkpoint, load_checkpoint
from entrenar.training.learner import Learner
from entrenar.training.loop import Trainer, improves
from entrenar.training.state import Plan, State, StepReport
from entrenar.training.step import StepResult
from tests.support.learning import learner

PLAN = Plan(
    total_steps=12, batch_size=6, micro_batch=3, pack_to=128, seed=0, lr=2e-2, schedule="cosine", warmup_steps=2,
    max_grad_norm=1.0, eval_every=3, patience=0, checkpoint_every=0, keep_checkpoints=2,
)  # fmt: skip


def run(
    model: PreTrainedModel, data: PreparedData, directory: Path, plan: Plan = PLAN
) -> tuple[State, list[StepReport]]:
    factors = [factor for _, layer in adapted_layers(model) for factor in (layer.lora_a, layer.lora_b)]
    optimizer = make_adamw(factors, plan.lr, (0.9, 0.999), 1e-8, 0.0)
    reports: list[StepReport] = []
    trainer = Trainer(learner(model, optimizer), data, plan, State(data.fingerprint), directory, 0, reports.append)
    return trainer.run(), reports


def test_training_lowers_the_loss_and_reports_every_step(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    state, reports = run(tiny_qlora, tiny_prepared, tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert state.step == len(reports) == len(rows) == 12
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert [row["loss"] for row in rows] == [report.loss for report in reports]
    assert [row["lr"] for row in rows] == [PLAN.lr * learning_rate_factor(n, 12, 2, "cosine") for n in range(12)]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 9, 12]


def test_the_validation_loss_is_the_models_loss_on_the_held_out_rows(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    state, _ = run(tiny_qlora, tiny_prepared, tmp_path)
    assert tiny_prepared.validation is not None
    assert state.eval_loss == pytest.approx(perplexity(tiny_qlora, tiny_prepared.validation, 1, 0).loss, rel=1e-5)


def test_early_stop_ends_the_run_and_puts_the_best_adapter_back(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    plan = dataclasses.replace(PLAN, total_steps=200, lr=0.5, schedule="constant", eval_every=1, patience=3)
    state, reports = run(tiny_qlora, tiny_prepared, tmp_path, plan)
    evaluated = [report.eval_loss for report in reports if report.eval_loss is not None]
    assert state.step < 200
    assert state.best_loss == min(evaluated)
    assert state.step == state.best_step + 3
    assert tiny_prepared.validation is not None
    assert perplexity(tiny_qlora, tiny_prepared.validation, 1, 0).loss == pytest.approx(min(evaluated), rel=1e-5)


def test_three_non_finite_batches_in_a_row_end_the_run_and_name_the_rows(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    next(layer for _, layer in adapted_layers(tiny_qlora)).lora_b.data.fill_(math.inf)
    before = [layer.lora_a.detach().clone() for _, layer in adapted_layers(tiny_qlora)]
    with pytest.raises(EntrenarError, match=r"3 batches in a row .* lines \d+, \d+") as caught:
        run(tiny_qlora, tiny_prepared, tmp_path)
    assert caught.value.exit_code == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 0, 0]
    after = [layer.lora_a.detach() for _, layer in adapted_layers(tiny_qlora)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not list(tmp_path.glob("checkpoints/*"))


def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
    return make_adamw([parameter for _, parameter in trained_parameters(model)], PLAN.lr, (0.9, 0.999), 1e-8, 0.0)


def trainer_of(
    model: PreTrainedModel,
    data: PreparedData,
    directory: Path,
    plan: Plan,
) -> Trainer:
    return Trainer(
        learner(model, optimizer_of(model)), data, plan, State(data.fingerprint), directory, 0, lambda _: None
    )


def with_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Evaluations give these, one after the other."""
    given = iter(losses)
    monkeypatch.setattr(Trainer, "_mean_loss", lambda *_: next(given))


def test_a_loss_that_is_not_finite_is_never_the_best(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(PLAN, total_steps=6, eval_every=1, patience=3)
    with_losses(monkeypatch, [math.nan, 5.0, 4.0, math.inf, 3.0, 3.0])
    state = trainer_of(tiny_qlora, tiny_prepared, tmp_path, plan).run()
    assert (state.step, state.best_step, state.best_loss) == (6, 5, 3.0)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [row.get("eval_loss") for row in map(json.loads, text.splitlines())] == ["nan", 5.0, 4.0, "inf", 3.0, 3.0]
    assert "NaN" not in text


def test_patience_without_any_finite_evaluation_is_an_error(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(PLAN, total_steps=6, eval_every=1, patience=2)
    with_losses(monkeypatch, [math.nan] * 6)
    with pytest.raises(EntrenarError, match="no evaluation gave a finite loss") as caught:
        trainer_of(tiny_qlora, tiny_prepared, tmp_path, plan).run()
    assert caught.value.exit_code == 1


@given(st.lists(st.floats(), max_size=8))
def test_the_best_is_the_first_lowest_of_the_finite_losses(losses: list[float]) -> None:
    best: float | None = None
    for loss in losses:
        best = loss if improves(loss, best) else best
    assert best == min((loss for loss in losses if math.isfinite(loss)), default=None)


def test_an_update_that_is_not_finite_ends_the_run_unsaved(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    """B is zero at the first step, so A's gradient and moments are: 0/0 without an eps."""
    trainer = trainer_of(tiny_qlora, tiny_prepared, tmp_path, dataclasses.replace(PLAN, checkpoint_every=1))
    for group in trainer._learner.optimizer.param_groups:
        group["eps"] = 1e-50
    with pytest.raises(EntrenarError, match=r"update 1 .*not finite: lower optimizer\.lr or raise optimizer\.eps"):
        trainer.run()
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("step", [3, 12])
def test_a_stop_ends_an_evaluation_and_the_run_goes_on_within_it_bit_for_bit(
    tiny_model_dir: Path, tiny_prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The signal comes at the evaluation's second micro-batch of two; the third is not computed."""

    def fresh() -> PreTrainedModel:
        model, _ = load(str(tiny_model_dir), "nf4", dtype="float32")
        torch.manual_seed(0)
        attach_lora(model, rank=4, alpha=8, dropout=0.1)
        return model

    straight = fresh()
    whole = trainer_of(straight, tiny_prepared, tmp_path / "straight", PLAN).run()
    broken, passes = trainer_of(fresh(), tiny_prepared, tmp_path / "broken", PLAN), []

    def watched(model: PreTrainedModel, *tensors: torch.Tensor) -> torch.Tensor:
        if not model.training and broken.state.step == step:
            passes.append(step)
            signal.raise_signal(signal.SIGTERM)
        return target_loss(model, *tensors)

    monkeypatch.setattr(supervised, "target_loss", watched)
    with pytest.raises(StoppedError, match=f"stopped by SIGTERM after step {step} of 12; a checkpoint was written"):
        broken.run()
    assert passes == [step]
    monkeypatch.undo()
    resumed = fresh()
    optimizer, path = optimizer_of(resumed), latest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert path is not None
    state = load_checkpoint(path, resumed, optimizer, tiny_prepared.fingerprint)
    assert state.pending is not None
    directory = tmp_path / "broken"
    again = Trainer(learner(resumed, optimizer), tiny_prepared, PLAN, state, directory, 0, lambda _: None).run()
    assert all(torch.equal(a, b) for a, b in zip(*map(tensors_of, (straight, resumed)), strict=True))
    logs = [numbers(tmp_path / name / "metrics.jsonl") for name in ("straight", "broken")]
    assert logs[0] == logs[1]
    aside = {"seconds": 0.0, "sessions": 0}
    assert dataclasses.replace(again, **aside) == dataclasses.replace(whole, **aside)


def tensors_of(model: PreTrainedModel) -> list[torch.Tensor]:
    return [parameter.detach() for _, parameter in trained_parameters(model)]


def numbers(path: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_bytes")} for row in read_metrics(path)]


def test_a_skipped_batch_is_logged_once_however_often_it_is_met(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the row of a skipped batch, resumed from the checkpoint before it."""
    plan = dataclasses.replace(PLAN, total_steps=4, eval_every=0, checkpoint_every=2)
    made = loop.update

    def sometimes(learner: Learner, *rest: Any) -> StepResult:
        return StepResult(math.nan, 1.0) if trainer.state.batch == 2 else made(learner, *rest)

    monkeypatch.setattr(loop, "update", sometimes)
    trainer = trainer_of(tiny_qlora, tiny_prepared, tmp_path, plan)
    trainer.run()
    log = (tmp_path / "metrics.jsonl").read_bytes()
    assert sum("skipped" in row for row in read_metrics(tmp_path / "metrics.jsonl")) == 1
    path = latest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    assert path.name == "step-2"
    state = load_checkpoint(path, tiny_qlora, trainer._learner.optimizer, tiny_prepared.fingerprint)
    trainer = Trainer(
        learner(tiny_qlora, trainer._learner.optimizer), tiny_prepared, plan, state, tmp_path, 0, lambda _: None
    )
    trainer.run()
    again = (tmp_path / "metrics.jsonl").read_bytes()
    assert [row.get("skipped") for row in map(json.loads, log.splitlines())] == [
        row.get("skipped") for row in map(json.loads, again.splitlines())
    ]
