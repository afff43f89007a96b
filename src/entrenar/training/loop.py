"""The one training loop: batch → update → log → evaluate → checkpoint, until the plan is done or a stop comes."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from entrenar.core.errors import EntrenarError, StoppedError
from entrenar.core.run_log import MetricsLog
from entrenar.data.batches import batch_rows, micro_batches
from entrenar.data.dataset import Dataset, PreparedData
from entrenar.models.device_memory import used_bytes
from entrenar.models.forward import target_loss
from entrenar.optim.schedule import learning_rate_factor
from entrenar.training.checkpoint import BEST, STEP, drop_older, load_factors, save_checkpoint
from entrenar.training.signals import StopRequest
from entrenar.training.state import Plan, State, StepReport
from entrenar.training.step import StepResult, update

MAX_SKIPPED = 3
OnStep = Callable[[StepReport], None]


class Trainer:
    """One run in progress: the model, its data, plan and state, and the directory it writes to."""

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        data: PreparedData,
        plan: Plan,
        state: State,
        directory: Path,
        pad_id: int,
        on_step: OnStep,
    ) -> None:
        self._model, self._optimizer, self._data = model, optimizer, data
        self._plan, self.state, self._pad_id, self._on_step = plan, state, pad_id, on_step
        self._checkpoints = directory / "checkpoints"
        self._log = MetricsLog(directory / "metrics.jsonl", after_step=state.step)
        self._started, self._first_step, self._first_tokens = time.monotonic(), state.step, state.tokens

    def run(self) -> State:
        """Train to the end of the plan, or to an early stop, whose best adapter is then put back.

        Raises:
            StoppedError: a signal came; a checkpoint was written.
            EntrenarError: three batches in a row gave a non-finite loss or gradient.
        """
        self._model.train()
        try:
            with StopRequest() as stop:
                while self.state.step < self._plan.total_steps and not self._is_exhausted():
                    self._step()
                    if stop.received:
                        self._stop(stop.received)
        finally:
            self._log.close()
            self._model.eval()
        if self._plan.patience and self.state.best_step:
            load_factors(self._checkpoints / f"{BEST}-{self.state.best_step}", self._model)
        return self.state

    def _step(self) -> None:
        state, plan = self.state, self._plan
        rows = batch_rows(len(self._data.train), plan.batch_size, plan.seed, state.batch)
        examples = [self._data.train.examples[row] for row in rows]
        batches = micro_batches(examples, plan.micro_batch, self._pad_id, plan.pack_to)
        # Dropout, too, is a pure function of the run's seed and the batch's number.
        torch.manual_seed(plan.seed * 1_000_003 + state.batch)
        factor = learning_rate_factor(state.step, plan.total_steps, plan.warmup_steps, plan.schedule)
        result = update(self._model, self._optimizer, batches, plan.lr * factor, plan.max_grad_norm)
        state.batch += 1
        if not result.is_finite:
            self._skip(result, sorted(line for batch in batches for line in batch.lines))
            return
        state.skipped_in_a_row = 0
        state.step += 1
        state.tokens += sum(batch.token_count for batch in batches)
        state.train_loss = result.loss
        self._finish_step(result, plan.lr * factor)

    def _finish_step(self, result: StepResult, lr: float) -> None:
        state, plan = self.state, self._plan
        evaluated = self._evaluate() if self._is_due(plan.eval_every) else None
        report = self._report(result, lr, evaluated)
        row = {"loss": report.loss, "lr": lr, "grad_norm": report.grad_norm, "tokens": state.tokens}
        row |= {"tokens_per_s": report.tokens_per_s, "memory_bytes": report.memory_bytes}
        self._log.write({"step": state.step, **row, **({} if evaluated is None else {"eval_loss": evaluated})})
        self._on_step(report)
        if self._is_due(plan.checkpoint_every) and state.step < plan.total_steps:
            self._save(STEP, plan.keep_checkpoints)

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.state.step % every == 0 or self.state.step == self._plan.total_steps)

    def _is_exhausted(self) -> bool:
        return bool(self._plan.patience) and self.state.evaluations_since_best >= self._plan.patience

    def _evaluate(self) -> float | None:
        state, dataset = self.state, self._data.validation
        if dataset is None:
            return None
        state.eval_loss = self._mean_loss(dataset)
        if state.best_loss is None or state.eval_loss < state.best_loss:
            state.best_loss, state.best_step, state.evaluations_since_best = state.eval_loss, state.step, 0
            self._save(BEST, keep=1)
        else:
            state.evaluations_since_best += 1
        return state.eval_loss

    @torch.no_grad()
    def _mean_loss(self, dataset: Dataset) -> float:
        self._model.eval()
        batches = micro_batches(dataset.examples, self._plan.micro_batch, self._pad_id, self._plan.pack_to)
        total = sum(target_loss(self._model, batch.ids, batch.positions, batch.targets).item() for batch in batches)
        self._model.train()
        return total / sum(batch.target_count for batch in batches)

    def _report(self, result: StepResult, lr: float, evaluated: float | None) -> StepReport:
        state, plan = self.state, self._plan
        seconds = time.monotonic() - self._started
        return StepReport(
            step=state.step,
            total_steps=plan.total_steps,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            tokens_per_s=(state.tokens - self._first_tokens) / seconds,
            seconds_left=seconds / (state.step - self._first_step) * (plan.total_steps - state.step),
            memory_bytes=used_bytes(self._model.device),
            eval_loss=evaluated,
        )

    def _skip(self, result: StepResult, lines: list[int]) -> None:
        state = self.state
        state.skipped_in_a_row += 1
        where = f"lines {', '.join(map(str, lines))} of the training file"
        values = {"skipped": where, "loss": str(result.loss), "grad_norm": str(result.grad_norm)}
        self._log.write({"step": state.step, **values})
        if state.skipped_in_a_row >= MAX_SKIPPED:
            raise EntrenarError(
                f"{MAX_SKIPPED} batches in a row gave a non-finite loss or gradient (the last: {where}): lower "
                "optimizer.lr or look at those rows; nothing non-finite was saved"
            )

    def _save(self, prefix: str, keep: int) -> None:
        name = f"{prefix}-{self.state.step}"
        save_checkpoint(self._checkpoints, name, self._model, self._optimizer, self.state)
        drop_older(self._checkpoints, prefix, keep)

    def _stop(self, signal_name: str) -> None:
        if self.state.step < self._plan.total_steps:
            self._save(STEP, self._plan.keep_checkpoints)
            raise StoppedError(
                f"stopped by {signal_name} after step {self.state.step} of {self._plan.total_steps}; a checkpoint was "
                "written, and the same command goes on from there"
            )
