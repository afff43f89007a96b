"""The loop: it learns, logs, stops early at the best adapter, and gives up on a diverged run."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from entrenar.core.errors import EntrenarError
from entrenar.core.run_log import read_metrics
from entrenar.data.dataset import PreparedData
from entrenar.evaluation.perplexity import perplexity
from entrenar.lora.attach import adapted_layers
from entrenar.optim.adamw import make_adamw
from entrenar.optim.schedule import learning_rate_factor
from entrenar.training.loop import Trainer
from entrenar.training.state import Plan, State, StepReport

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
    trainer = Trainer(model, optimizer, data, plan, State(data.fingerprint), directory, 0, reports.append)
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
