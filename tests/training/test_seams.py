"""The seams of training, each with a second, tiny implementation: an objective, an optimiser, a world of two."""

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.core.run_log import read_metrics
from entrenar.data.batches import Batch, collate
from entrenar.data.dataset import PreparedData
from entrenar.data.encode import Example
from entrenar.lora.attach import trained_parameters
from entrenar.models.forward import sequence_losses, target_loss
from entrenar.objectives.objective import Loss, Objective
from entrenar.objectives.supervised import SUPERVISED
from entrenar.optim.optimizers import OPTIMIZERS, Groups, OptimizerKind, OptimizerOptions
from entrenar.planning.run_plan import plan_memory
from entrenar.recipes.config import TrainingSection
from entrenar.training import loop
from entrenar.training.checkpoint import load_checkpoint, load_factors
from entrenar.training.learner import Learner
from entrenar.training.loop import Trainer
from entrenar.training.state import Plan, State, StepReport

PLAN = Plan(
    total_steps=3, batch_size=4, micro_batch=2, pack_to=0, seed=0, lr=2e-2, schedule="constant", warmup_steps=0,
    max_grad_norm=1.0, eval_every=3, patience=0, checkpoint_every=0, keep_checkpoints=2,
)  # fmt: skip
OPTIONS = OptimizerOptions(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)


def parameters_of(model: PreTrainedModel) -> list[nn.Parameter]:
    return [parameter for _, parameter in trained_parameters(model)]


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trained_parameters(model)}


def adamw(model: PreTrainedModel) -> torch.optim.Optimizer:
    return OPTIMIZERS["adamw"].make([{"params": parameters_of(model)}], OPTIONS)


def run(
    learner: Learner, data: PreparedData, directory: Path, plan: Plan = PLAN, state: State | None = None
) -> tuple[State, list[StepReport]]:
    reports: list[StepReport] = []
    start = state or State(data.fingerprint)
    return Trainer(learner, data, plan, start, directory, 0, reports.append).run(), reports


class Pairs(Objective):
    """A row is preferred to the same row with its answer backwards: −log σ(β·(loss of the other − loss of the row)),
    which is DPO (Rafailov et al. 2023, equation 7) against a reference that finds both alike."""

    def sequences(self, row: Example) -> Sequence[Example]:
        answer = [token for token, trained in zip(row.ids, row.trained, strict=True) if trained][::-1]
        ids = [answer.pop(0) if trained else token for token, trained in zip(row.ids, row.trained, strict=True)]
        return row, dataclasses.replace(row, ids=ids)

    def batches(self, rows: Sequence[Example], micro_batch: int, pad_id: int, pack_to: int) -> list[Batch]:
        parts = [rows[at : at + micro_batch] for at in range(0, len(rows), micro_batch)]
        return [collate([[one] for row in part for one in self.sequences(row)], pad_id) for part in parts]

    def trial(self, ids: Sequence[int]) -> Batch:
        return self.batches([Example(0, list(ids), [index > 0 for index in range(len(ids))])], 1, 0, 0)[0]

    def count(self, batch: Batch) -> int:
        return len(batch.ids) // 2

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        chosen, rejected = sequence_losses(model, batch.ids, batch.positions, batch.targets).view(-1, 2).unbind(1)
        margin = rejected - chosen
        return Loss(-F.logsigmoid(0.1 * margin).sum(), {"margin": margin.sum().item()})


def test_a_second_objective_trains_evaluates_and_is_planned(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    plan = dataclasses.replace(PLAN, total_steps=12, eval_every=6)
    state, reports = run(Learner(tiny_qlora, adamw(tiny_qlora), Pairs()), tiny_prepared, tmp_path, plan)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["margin"] for row in rows] == [report.figures["margin"] for report in reports]
    assert rows[-1]["margin"] > rows[0]["margin"] + 1
    assert state.eval_loss is not None
    assert state.eval_loss < reports[0].loss

    settings = TrainingSection(memory=10**10, batch_size=4)  # pyright: ignore[reportArgumentType]
    kind = OPTIMIZERS["adamw"]
    pairs = plan_memory(settings, tiny_qlora, tiny_prepared, plan, Pairs(), kind, libraries=0)
    alone = plan_memory(settings, tiny_qlora, tiny_prepared, plan, SUPERVISED, kind, libraries=0)
    assert pairs.tokens == max(alone.tokens, pairs.tokens)


@pytest.mark.parametrize("trained_head", [False, True])
def test_sums_of_sequences_are_each_documents_own_loss(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, trained_head: bool
) -> None:
    """Packed or not, with any weights on the sums: against a pass for every document."""
    examples = tiny_prepared.train.examples[:5]
    batch = collate([examples[:3], examples[3:]], pad_id=0)
    head = tiny_qlora.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.weight.requires_grad_(trained_head)
    weights = torch.linspace(-1, 2, 5, dtype=torch.float64)
    wanted = [*parameters_of(tiny_qlora), *([head.weight] if trained_head else [])]
    for parameter in parameters_of(tiny_qlora):
        nn.init.normal_(parameter, std=0.05)

    together = sequence_losses(tiny_qlora, batch.ids, batch.positions, batch.targets)
    gradients = torch.autograd.grad((together * weights).sum(), wanted)
    alone = [collate([[example]], 0) for example in examples]
    losses = torch.stack([target_loss(tiny_qlora, one.ids, one.positions, one.targets) for one in alone])
    expected = torch.autograd.grad((losses * weights).sum(), wanted)
    torch.testing.assert_close(together, losses, rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
    whole = target_loss(tiny_qlora, batch.ids, batch.positions, batch.targets)
    torch.testing.assert_close(together.sum(), whole, rtol=1e-6, atol=1e-6)


class Averaging(torch.optim.SGD):
    """SGD with momentum whose weights are evaluated as their mean over all steps."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().step(closure)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            state = self.state[parameter]
            state.setdefault("steps", torch.zeros(()))
            state.setdefault("mean", torch.zeros_like(parameter))
            state["steps"] += 1
            state["mean"] += (parameter.detach() - state["mean"]) / state["steps"]


def make_averaging(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    optimizer = Averaging(list(groups), lr=options.lr, momentum=options.beta1)
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        zeros = {"momentum_buffer": torch.zeros_like(parameter), "mean": torch.zeros_like(parameter)}
        optimizer.state[parameter] = zeros | {"steps": torch.zeros(())}
    return optimizer


@contextmanager
def mean_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    trained = [(parameter, parameter.detach().clone()) for parameter in optimizer.state]
    for parameter, state in optimizer.state.items():
        parameter.data.copy_(state["mean"])
    yield
    for parameter, value in trained:
        parameter.data.copy_(value)


def swapped(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    return mean_weights(optimizer)


AVERAGING = OptimizerKind(
    make=make_averaging,
    state_bytes=lambda parameters: sum(2 * one.numel() * one.element_size() + 4 for one in parameters),
    evaluating=swapped,
)


def test_a_second_optimiser_is_evaluated_checkpointed_resumed_and_planned(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, tmp_path: Path
) -> None:
    plan = dataclasses.replace(PLAN, total_steps=6, checkpoint_every=2, keep_checkpoints=3)
    fresh = copy.deepcopy(tiny_qlora)
    optimizer = AVERAGING.make([{"params": parameters_of(tiny_qlora)}], OPTIONS)
    learner = Learner(tiny_qlora, optimizer, SUPERVISED, AVERAGING)
    state, _ = run(learner, tiny_prepared, tmp_path / "straight", plan)
    trained = tensors_of(tiny_qlora)

    assert state.best_step == 6
    with AVERAGING.evaluating(optimizer):
        averaged = tensors_of(tiny_qlora)
    assert any(not torch.equal(averaged[name], trained[name]) for name in trained)
    best = copy.deepcopy(fresh)
    load_factors(tmp_path / "straight" / "checkpoints" / "best-6", best)
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in tensors_of(best).items())

    again = AVERAGING.make([{"params": parameters_of(fresh)}], OPTIONS)
    where = tmp_path / "straight" / "checkpoints" / "step-4"
    resumed = load_checkpoint(where, fresh, again, tiny_prepared.fingerprint)
    run(Learner(fresh, again, SUPERVISED, AVERAGING), tiny_prepared, tmp_path / "again", plan, resumed)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in tensors_of(fresh).items())

    held = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert AVERAGING.state_bytes(parameters_of(tiny_qlora)) == held


class Two:
    """One of two threads that train together."""

    size = 2
    _turn = threading.Barrier(2)
    _given: ClassVar[list[list[Tensor]]] = [[], []]

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def _exchange(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        self._given[self.rank] = [tensor.detach().clone() for tensor in tensors]
        self._turn.wait(60)
        both = list(self._given[0]), list(self._given[1])
        self._turn.wait(60)
        return both

    def total(self, *numbers: float) -> tuple[float, ...]:
        first, second = self._exchange([torch.tensor(number, dtype=torch.float64) for number in numbers])
        return tuple((one + two).item() for one, two in zip(first, second, strict=True))

    def sum(self, tensors: Sequence[Tensor]) -> None:
        for tensor, one, two in zip(tensors, *self._exchange(list(tensors)), strict=True):
            tensor.copy_(one + two)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor, one in zip(tensors, self._exchange(list(tensors))[0], strict=True):
            tensor.copy_(one)

    def barrier(self) -> None:
        self._turn.wait(60)


class NoSignals:
    """In place of the loop's, which only a main thread may install."""

    received = None

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("batch_size", [4, 3])
def test_two_train_as_one(
    tiny_qlora: PreTrainedModel,
    tiny_prepared: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    """Also where the last batch of a pass has a row for one of them alone."""
    monkeypatch.setattr(loop, "StopRequest", NoSignals)
    plan = dataclasses.replace(PLAN, batch_size=batch_size, total_steps=8, eval_every=4)
    models = [copy.deepcopy(tiny_qlora) for _ in range(2)]
    alone, _ = run(Learner(tiny_qlora, adamw(tiny_qlora), SUPERVISED), tiny_prepared, tmp_path / "alone", plan)
    states: list[State | None] = [None, None]

    def work(rank: int) -> None:
        learner = Learner(models[rank], adamw(models[rank]), SUPERVISED, world=Two(rank))
        states[rank] = run(learner, tiny_prepared, tmp_path / "two", plan)[0]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [state.tokens if state else None for state in states] == [alone.tokens] * 2
    assert states[0] is not None
    assert states[0].eval_loss == pytest.approx(alone.eval_loss, rel=1e-4)
    assert len(read_metrics(tmp_path / "two" / "metrics.jsonl")) == 8
    first, second, expected = map(tensors_of, (*models, tiny_qlora))
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)
