"""The one training loop: batch → update → evaluate → log → checkpoint, until the plan is done or a stop comes."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from entrenar.core.errors import EntrenarError, StoppedError
from entrenar.core.run_log import MetricsLog
from entrenar.data.batches import Batch, batch_rows
from entrenar.data.dataset import Dataset, PreparedData
from entrenar.data.encode import Example
from entrenar.data.rows import places
from entrenar.optim.schedule import learning_rate_factor
from entrenar.planning.device_memory import used_bytes
from entrenar.training import loss_scale
from entrenar.training.checkpoint import BEST, STEP, drop_older, drop_unneeded_best, load_factors, save_checkpoint
from entrenar.training.learner import Learner
from entrenar.training.signals import StopRequest
from entrenar.training.state import Plan, State, StepReport, Update
from entrenar.training.step import StepResult, update

MAX_SKIPPED = 3
OnStep = Callable[[StepReport], None]


class Trainer:
    """One run in progress: the model, its data, plan and state, and the directory it writes to.

    `started`: when the session began (time.monotonic()), for the seconds that the state counts.
    """

    def __init__(
        self,
        learner: Learner,
        data: PreparedData,
        plan: Plan,
        state: State,
        directory: Path,
        pad_id: int,
        on_step: OnStep,
        started: float | None = None,
    ) -> None:
        self._learner, self._model, self._data = learner, learner.model, data
        self._plan, self.state, self._pad_id, self._on_step = plan, state, pad_id, on_step
        self._checkpoints = directory / "checkpoints"
        self._log = None  # process 0 alone writes files
        if learner.world.rank == 0:
            self._log = MetricsLog(directory / "metrics.jsonl", after_step=state.step, after_batch=state.batch)
        self._looped, self._first_step, self._first_tokens = time.monotonic(), state.step, state.tokens
        self._started, self._seconds_before = started or self._looped, state.seconds
        self._stop = StopRequest()

    def run(self) -> State:
        """Train to the end of the plan, or to an early stop, whose best adapter is then put back.

        Raises:
            StoppedError: a signal came; a checkpoint was written.
            EntrenarError: three batches in a row gave a non-finite loss or gradient; an update made a parameter that is
                not finite; no evaluation gave a finite loss, and `patience` needs a best one.
        """
        self._model.train()
        try:
            with self._stop:
                self._drop_older()
                if self.state.pending:
                    self._finish_step(self.state.pending)
                while self.state.step < self._plan.total_steps and not self._is_exhausted():
                    self._step()
                    if self._stop.received and self.state.step < self._plan.total_steps:
                        self._leave()
        finally:
            if self._log:
                self._log.close()
            self._model.eval()
        self._note_seconds()
        if self._plan.patience:
            self._put_best_back()
        return self.state

    def _step(self) -> None:
        state, plan = self.state, self._plan
        rows = batch_rows(len(self._data.train), plan.batch_size, plan.seed, state.batch)
        batches = self._batches([self._data.train.examples[row] for row in rows])
        lr = plan.lr * learning_rate_factor(state.step, plan.total_steps, plan.warmup_steps, plan.schedule)
        result = self._update(batches, lr)
        state.batch += 1
        if not result.is_finite:
            self._skip(result, places(self._data.train.rows[row] for row in rows))
            return
        if not result.is_sound:
            self._refuse_unsound(lr)
        loss_scale.note_success(state)
        state.skipped_in_a_row = 0
        state.step += 1
        (tokens,) = self._learner.world.total(sum(batch.token_count for batch in batches))
        state.tokens += int(tokens)
        state.train_loss = result.loss
        self._finish_step(Update(loss=result.loss, grad_norm=result.grad_norm, lr=lr, figures=dict(result.figures)))

    def _batches(self, rows: Sequence[Example]) -> list[Batch]:
        """This process' share of rows, in micro-batches; none where there are fewer rows than processes."""
        world, plan = self._learner.world, self._plan
        share = rows[world.rank :: world.size]
        if not share:
            return []
        return self._learner.objective.batches(share, plan.micro_batch, self._pad_id, plan.pack_to)

    def _update(self, batches: list[Batch], lr: float) -> StepResult:
        """One update; in float16 a batch that overflows is taken again at half the scale."""
        state, plan, scale = self.state, self._plan, self.state.loss_scale
        while True:
            # Dropout, too, is a pure function of the run's seed and the batch's number.
            torch.manual_seed(plan.seed * 1_000_003 + state.batch)
            result = update(self._learner, batches, lr, plan.max_grad_norm, state.loss_scale)
            if result.is_finite:
                return result
            if not math.isfinite(result.loss) or not loss_scale.lower(state):
                state.loss_scale = scale  # it was not for the scale
                return result

    def _finish_step(self, result: Update) -> None:
        state, plan = self.state, self._plan
        state.pending = result
        evaluated = self._evaluate() if self._is_due(plan.eval_every) else None
        state.pending = None
        report = self._report(result, evaluated)
        row: dict[str, Any] = {
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": state.tokens,
        }
        row |= {"tokens_per_s": report.tokens_per_s, "memory_bytes": report.memory_bytes, **result.figures}
        self._write({"step": state.step, **row, **({} if evaluated is None else {"eval_loss": _json(evaluated)})})
        self._on_step(report)
        if self._is_due(plan.checkpoint_every) and state.step < plan.total_steps:
            self._save(STEP)

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.state.step % every == 0 or self.state.step == self._plan.total_steps)

    def _is_exhausted(self) -> bool:
        return bool(self._plan.patience) and self.state.evaluations_since_best >= self._plan.patience

    def _evaluate(self) -> float | None:
        state, dataset = self.state, self._data.validation
        if dataset is None:
            return None
        with self._learner.kind.evaluating(self._learner.optimizer):
            state.eval_loss = self._mean_loss(dataset)
            if improves(state.eval_loss, state.best_loss):
                state.best_loss, state.best_step, state.evaluations_since_best = state.eval_loss, state.step, 0
                self._save(BEST)
            else:
                state.evaluations_since_best += 1
        return state.eval_loss

    @torch.no_grad()
    def _mean_loss(self, dataset: Dataset) -> float:
        """Of the objective. A stop is obeyed between any two micro-batches."""
        self._model.eval()
        objective, batches = self._learner.objective, self._batches(dataset.examples)
        total = 0.0
        for batch in batches:
            if self._stop.received:
                self._leave()
            total += objective.loss(self._model, batch).total.item()
        self._model.train()
        total, count = self._learner.world.total(total, sum(map(objective.count, batches)))
        return total / count

    def _report(self, result: Update, evaluated: float | None) -> StepReport:
        state, plan = self.state, self._plan
        seconds, steps = time.monotonic() - self._looped, max(state.step - self._first_step, 1)
        return StepReport(
            step=state.step,
            total_steps=plan.total_steps,
            loss=result.loss,
            lr=result.lr,
            grad_norm=result.grad_norm,
            tokens_per_s=(state.tokens - self._first_tokens) / seconds,
            seconds_left=seconds / steps * (plan.total_steps - state.step),
            memory_bytes=used_bytes(self._model.device),
            eval_loss=evaluated,
            figures=result.figures,
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self._log:
            self._log.write(row)

    def _skip(self, result: StepResult, where: str) -> None:
        state = self.state
        state.skipped_in_a_row += 1
        values = {"skipped": where, "loss": str(result.loss), "grad_norm": str(result.grad_norm)}
        self._write({"step": state.step, "batch": state.batch, **values})
        if state.skipped_in_a_row >= MAX_SKIPPED:
            raise EntrenarError(
                f"{MAX_SKIPPED} batches in a row gave a non-finite loss or gradient (the last: {where}): lower "
                "optimizer.lr or look at those rows; nothing non-finite was saved"
            )

    def _refuse_unsound(self, lr: float) -> None:
        raise EntrenarError(
            f"update {self.state.step + 1} (learning rate {lr:g}) made weights that are not finite: lower optimizer.lr "
            "or raise optimizer.eps; nothing non-finite was saved"
        )

    def _put_best_back(self) -> None:
        if not self.state.best_step:
            raise EntrenarError(
                "no evaluation gave a finite loss, so no step is the best: look at the validation rows, compute in "
                "float32 (model.dtype), or set eval.patience: 0"
            )
        load_factors(self._checkpoints / f"{BEST}-{self.state.best_step}", self._model)

    def _save(self, prefix: str) -> None:
        self._note_seconds()
        if self._log:
            name = f"{prefix}-{self.state.step}"
            save_checkpoint(self._checkpoints, name, self._model, self._learner.optimizer, self.state)
            self._drop_older()
        self._learner.world.barrier()

    def _drop_older(self) -> None:
        if not self._log:
            return
        drop_older(self._checkpoints, STEP, self._plan.keep_checkpoints)
        drop_unneeded_best(self._checkpoints, self.state.best_step)

    def _note_seconds(self) -> None:
        self.state.seconds = self._seconds_before + time.monotonic() - self._started

    def _leave(self) -> None:
        self._save(STEP)
        raise StoppedError(
            f"stopped by {self._stop.received} after step {self.state.step} of {self._plan.total_steps}; a checkpoint "
            "was written, and the same command goes on from there"
        )


def improves(loss: float, best: float | None) -> bool:
    """Whether `loss` is better than the best so far. One that is not finite never is, and none is worse than any: of
    finite losses the order is total, so whoever compares the same two numbers decides alike."""
    return math.isfinite(loss) and (best is None or loss < best)


def _json(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
