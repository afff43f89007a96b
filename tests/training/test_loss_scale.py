"""float16: gradients that would underflow arrive, a scale that overflows costs no batch. The oracle is float32."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.core.run_log import read_metrics
from entrenar.data.batches import Batch, micro_batches
from entrenar.data.dataset import PreparedData
from entrenar.lora.attach import attach_lora, trained_parameters
from entrenar.opening.load import load
from entrenar.optim.adamw import make_adamw
from entrenar.training import loop
from entrenar.training.loss_scale import FIRST, MOST, STEADY, first_scale, lower, note_success
from entrenar.training.state import Plan, State
from entrenar.training.step import StepResult, update
from tests.support.learning import accumulated, learner

PLAN = Plan(
    total_steps=4, batch_size=6, micro_batch=3, pack_to=0, seed=0, lr=1e-2, schedule="constant", warmup_steps=0,
    max_grad_norm=1.0, eval_every=0, patience=0, checkpoint_every=0, keep_checkpoints=2,
)  # fmt: skip


def adapted(directory: Path, dtype: str) -> PreTrainedModel:
    model, _ = load(str(directory), "nf4", dtype=dtype)
    torch.manual_seed(0)
    attach_lora(model, rank=4, alpha=8)
    for name, parameter in trained_parameters(model):
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: PreTrainedModel, batches: list[Batch], factor: float) -> dict[str, Tensor]:
    """Of the mean loss, computed at `factor` times it."""
    accumulated(model, batches, (), factor)
    return {name: p.grad / factor for name, p in trained_parameters(model) if p.grad is not None}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())


def test_scaled_gradients_are_float32s_at_ten_thousand_times_the_targets(
    tiny_model_dir: Path, tiny_prepared: PreparedData
) -> None:
    """A batch of 10,000 times as many targets has gradients of each that are 10,000 times smaller."""
    batches, many = micro_batches(tiny_prepared.train.examples[:8], 8, 0), 1e-4
    wanted = gradients(adapted(tiny_model_dir, "float32"), batches, 1.0)
    half = adapted(tiny_model_dir, "float16")
    assert worst(gradients(half, batches, many), wanted) > 0.5
    half.zero_grad()
    assert worst(gradients(half, batches, many * FIRST), wanted) < 0.01


def test_the_scale_changes_no_update_of_float32(tiny_model_dir: Path, tiny_prepared: PreparedData) -> None:
    """Scaling by a power of two and back rounds nothing: bit for bit."""
    batches, found = micro_batches(tiny_prepared.train.examples[:8], 3, 0), []
    for scale in (1.0, FIRST):
        model = adapted(tiny_model_dir, "float32")
        parameters = [parameter for _, parameter in trained_parameters(model)]
        update(learner(model, make_adamw(parameters, 1e-2, (0.9, 0.999), 1e-8, 0.0)), batches, 1e-2, 1.0, scale)
        found.append(parameters)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_run_in_float16_learns_as_in_float32(
    tiny_model_dir: Path, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    losses = {}
    for dtype in ("float32", "float16"):
        model = adapted(tiny_model_dir, dtype)
        optimizer = make_adamw([p for _, p in trained_parameters(model)], 1e-2, (0.9, 0.999), 1e-8, 0.0)
        state = State("", loss_scale=first_scale(model.dtype))
        trainer = loop.Trainer(
            learner(model, optimizer), tiny_prepared, PLAN, state, tmp_path / dtype, 0, lambda _: None
        )
        trainer.run()
        losses[dtype] = [row["loss"] for row in read_metrics(tmp_path / dtype / "metrics.jsonl")]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=5e-3)


def test_an_overflow_takes_the_same_batch_again_and_a_bad_batch_leaves_the_scale(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update is stubbed: it overflows above 2¹⁴, and the third batch is bad at any scale."""
    seen: list[tuple[tuple[int, ...], float]] = []
    plan, order = PLAN, {}

    def stub(_: object, batches: list[Batch], _lr: float, _n: float, scale: float) -> StepResult:
        lines = tuple(sorted(line for batch in batches for line in batch.lines))
        seen.append((lines, scale))
        number = order.setdefault(lines, len(order))
        return StepResult(1.0, math.inf if scale > 2**14 or number == 2 else 1.0)

    monkeypatch.setattr(loop, "update", stub)
    optimizer = make_adamw([p for _, p in trained_parameters(tiny_qlora)], 1e-2, (0.9, 0.999), 1e-8, 0.0)
    state = State("", loss_scale=FIRST)
    loop.Trainer(learner(tiny_qlora, optimizer), tiny_prepared, plan, state, tmp_path, 0, lambda _: None).run()
    assert [scale for lines, scale in seen if order[lines] == 0] == [2**16, 2**15, 2**14]
    assert min(scale for lines, scale in seen if order[lines] == 2) == 1
    assert (state.loss_scale, state.step) == (2**14, 4)
    assert sum("skipped" in row for row in read_metrics(tmp_path / "metrics.jsonl")) == state.batch - state.step


def test_a_steady_run_tries_a_larger_scale_up_to_a_bound() -> None:
    state = State("", loss_scale=FIRST)
    for _ in range(STEADY - 1):
        note_success(state)
    assert state.loss_scale == FIRST
    note_success(state)
    assert (state.loss_scale, state.steps_at_scale) == (2 * FIRST, 0)
    assert lower(state)
    assert state.loss_scale == FIRST
    most, plain = State("", loss_scale=MOST, steps_at_scale=STEADY), State("")
    note_success(most)
    note_success(plain)
    assert (most.loss_scale, plain.loss_scale, lower(plain)) == (MOST, 1.0, False)
