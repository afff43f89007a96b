"""What makes a plan unlikely to work, one sentence each: for `check` and `train` to say before anything is computed.

A doubt is no error: nothing here changes a run. Thresholds lie well outside what works for LoRA with AdamW, which moves
a weight by about the learning rate an update.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entrenar.data.batches import batches_per_epoch
from entrenar.data.dataset import PreparedData
from entrenar.optim.schedule import learning_rate_factor
from entrenar.recipes.config import RunConfig
from entrenar.training.state import Plan

_FEW, _LITTLE = 100, 2.5e-3  # updates; the sum of their learning rates
_LARGE_LR = 0.1
_SEEN = 0.1  # share of validation rows that are trained on
_ROSE, _NATS = 1.5, 1.0  # a last loss that is this many times the first, and this much above it
_STEP_PARTS = 3  # a checkpoint: the adapter and two moments of it
_COUNTED = 100_000


def doubts(config: RunConfig, plan: Plan, data: PreparedData, adapter_bytes: int) -> list[str]:
    """One sentence for each thing that will probably not do what was meant."""
    return [
        *_of_length(config, plan, len(data.train)),
        *_of_rate(config, plan),
        *_of_validation(data),
        *_of_disk(config, plan, adapter_bytes),
    ]


def afterthoughts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a finished run's log gives away."""
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), float)]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    said = []
    if losses:
        first, last = losses[0], sum(losses[-5:]) / len(losses[-5:])
        if last > _ROSE * first and last > first + _NATS:
            said.append(
                f"the loss rose from {first:.2f} to {last:.2f}: the adapter is worse than none; lower optimizer.lr"
            )
    if evaluated and not isinstance(evaluated[-1], float):
        said.append(f"the last validation loss is {evaluated[-1]}: look at the validation rows, or lower optimizer.lr")
    return said


def _of_length(config: RunConfig, plan: Plan, rows: int) -> Iterator[str]:
    training, per_epoch = config.training, batches_per_epoch(rows, plan.batch_size)
    if training.max_steps and training.max_steps > training.epochs * per_epoch:
        yield (
            f"training.max_steps {training.max_steps} goes beyond training.epochs {training.epochs}, which are "
            f"{training.epochs * per_epoch} updates: the rows are passed {training.max_steps / per_epoch:.1f} times"
        )
    if plan.warmup_steps >= plan.total_steps:
        yield (
            f"optimizer.warmup_steps {plan.warmup_steps} does not end within the run's {plan.total_steps} updates: the "
            f"learning rate stays below optimizer.lr; lower it to a tenth of them"
        )


def _of_rate(config: RunConfig, plan: Plan) -> Iterator[str]:
    lora, optimizer = config.lora, config.optimizer
    if plan.lr >= _LARGE_LR:
        yield f"optimizer.lr {plan.lr:g} will make the loss explode: LoRA is usually trained with 1e-5 to 1e-2"
    if lora.alpha == 0 and not lora.alpha_pattern:
        yield "lora.alpha 0 multiplies the adapter by nothing: it will change no answer; 2 × lora.rank is usual"
    whole = lora.modules_to_save or lora.new_tokens
    moved = _rates(plan) * max(optimizer.lora_plus_ratio, lora.alpha / lora.rank / 2, 1)
    if not whole and plan.total_steps < _FEW and moved < _LITTLE:
        yield (
            f"{plan.total_steps} updates at optimizer.lr {plan.lr:g} move a weight by {moved:.1g} at most, which will "
            "teach next to nothing: lower training.batch_size, or raise training.epochs or optimizer.lr"
        )


def _rates(plan: Plan) -> float:
    """The sum of the run's learning rates."""
    steps = range(min(plan.total_steps, _COUNTED))
    return plan.lr * math.fsum(
        learning_rate_factor(step, plan.total_steps, plan.warmup_steps, plan.schedule) for step in steps
    )


def _of_validation(data: PreparedData) -> Iterator[str]:
    if data.validation is None:
        return
    trained = {tuple(example.ids) for example in data.train.examples}
    count = sum(tuple(example.ids) in trained for example in data.validation.examples)
    if count > _SEEN * len(data.validation):
        yield (
            f"{count} of {len(data.validation)} validation rows are trained on as well: their loss says nothing about "
            "new rows; name other rows in data.validation"
        )


def _of_disk(config: RunConfig, plan: Plan, adapter_bytes: int) -> Iterator[str]:
    """One more checkpoint than are kept is there for a moment."""
    count = (plan.keep_checkpoints if plan.checkpoint_every else 0) + bool(plan.eval_every) + 1
    needed = adapter_bytes * (1 + _STEP_PARTS * count)
    place = next((p for p in (Path(config.output), *Path(config.output).absolute().parents) if p.is_dir()), Path("/"))
    free = shutil.disk_usage(place).free
    if free < needed:
        yield (
            f"{place} has {free:,} bytes free and the run's checkpoints and adapter take about {needed:,}: make room, "
            "or lower checkpoint.keep"
        )
