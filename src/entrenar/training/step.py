"""One optimiser update over one global batch, in as many micro-batches, and on as many processes, as asked for.

The loss is summed over the whole batch and divided by the whole batch's count, so that no split changes the gradient.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from entrenar import native
from entrenar.data.batches import Batch
from entrenar.optim.groups import LR_RATIO
from entrenar.training.learner import Learner
from entrenar.training.world import World


@dataclass(frozen=True)
class StepResult:
    """Mean loss (nats per target token in supervised training), the gradient norm before clipping, whether what is
    trained is finite after the update, and the objective's own figures, means too."""

    loss: float
    grad_norm: float
    is_sound: bool = True
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether the update may be made."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Means(NamedTuple):
    """Of a batch: its loss and the objective's figures."""

    loss: float
    figures: dict[str, float]


def accumulate(
    learner: Learner,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter] = (),
    loss_scale: float = 1.0,
) -> Means:
    """Forward and backward over this process' micro-batches; gradients add up to its part of those of the mean loss.

    Args:
        parameters: whose gradients are moved, after the first of several micro-batches, into tensors allocated before
            anything else. A backward allocates a gradient among the activations; left there, it would keep the memory
            of the freed ones in pieces, and the next micro-batch's activations would need as much again.
        loss_scale: what the gradients come out multiplied by; the loss does not.
    """
    objective = learner.objective
    (count,) = learner.world.total(sum(map(objective.count, batches)))
    total, figures = 0.0, Counter[str]()
    places = [torch.empty_like(parameter) for parameter in parameters] if len(batches) > 1 else []
    for batch in batches:
        summed, of_batch = objective.loss(learner.model, batch)
        loss = summed / count
        (loss if loss_scale == 1 else loss * loss_scale).backward()
        total += loss.item()
        figures.update(of_batch)
        del loss, summed  # and with them what the graph's nodes still hold, before the next forward
        while places:
            place, parameter = places.pop(), parameters[len(places)]
            if parameter.grad is not None:
                parameter.grad = place.copy_(parameter.grad)
    names = sorted(figures)
    total, *sums = learner.world.total(total, *(figures[name] for name in names))
    return Means(total, {name: value / count for name, value in zip(names, sums, strict=True)})


def update(
    learner: Learner,
    batches: Sequence[Batch],
    lr: float,
    max_grad_norm: float,
    loss_scale: float = 1.0,
) -> StepResult:
    """One step; when loss or gradient norm is not finite nothing is changed."""
    native.use_huge_pages()
    optimizer = learner.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss, figures = accumulate(learner, batches, parameters, loss_scale)
    _sum_gradients(learner.world, parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if loss_scale != 1:
        for gradient in gradients:
            gradient.mul_(1 / loss_scale)
    norm = nn.utils.get_total_norm(gradients)
    result = StepResult(loss, float(norm), figures=figures)
    if not result.is_finite:
        return result
    if 0 < max_grad_norm < result.grad_norm:  # most steps need no pass over the gradients
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_RATIO, 1.0)
    optimizer.step()
    return replace(result, is_sound=_all_finite(parameters))


def _sum_gradients(world: World, parameters: Sequence[nn.Parameter]) -> None:
    """Over all processes, one of which may have had no row at all."""
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    world.sum([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def _all_finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every element is: a finite gradient can still make an update that is not (0/0 where eps rounds to 0, a
    rate beyond float32). The largest magnitude is NaN if any element is."""
    return math.isfinite(float(nn.utils.get_total_norm(parameters, math.inf)))
