"""One optimiser update over one global batch, in as many micro-batches as asked for.

Loss = sum over the target tokens of the whole batch / their count, so that the split into micro-batches does not
change the gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from entrenar import native
from entrenar.data.batches import Batch
from entrenar.models.forward import target_loss
from entrenar.optim.groups import LR_RATIO


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats per target token, the gradient norm before clipping, and whether what is trained is finite
    after the update."""

    loss: float
    grad_norm: float
    is_sound: bool = True

    @property
    def is_finite(self) -> bool:
        """Whether the update may be made."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def accumulate(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter] = (),
    loss_scale: float = 1.0,
) -> float:
    """Forward and backward over micro-batches; gradients add up to those of the mean loss, which is returned.

    Args:
        parameters: whose gradients move, after the first of several micro-batches, to places made before anything else:
            where a backward makes them lay activations, and the next micro-batch's would need as much again.
        loss_scale: what the gradients come out multiplied by; the loss does not.
    """
    count = sum(batch.target_count for batch in batches)
    total = 0.0
    places = [torch.empty_like(parameter) for parameter in parameters] if len(batches) > 1 else []
    for batch in batches:
        loss = target_loss(model, batch.ids, batch.positions, batch.targets) / count
        (loss if loss_scale == 1 else loss * loss_scale).backward()
        total += loss.item()
        del loss  # and with it what the graph's nodes still hold, before the next forward
        while places:
            place, parameter = places.pop(), parameters[len(places)]
            if parameter.grad is not None:
                parameter.grad = place.copy_(parameter.grad)
    return total


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    lr: float,
    max_grad_norm: float,
    loss_scale: float = 1.0,
) -> StepResult:
    """One step; when loss or gradient norm is not finite nothing is changed."""
    native.use_huge_pages()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate(model, batches, parameters, loss_scale)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if loss_scale != 1:
        for gradient in gradients:
            gradient.mul_(1 / loss_scale)
    norm = nn.utils.get_total_norm(gradients)
    result = StepResult(loss, float(norm))
    if not result.is_finite:
        return result
    if 0 < max_grad_norm < result.grad_norm:  # most steps need no pass over the gradients
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(LR_RATIO, 1.0)
    optimizer.step()
    return StepResult(loss, result.grad_norm, is_sound=_all_finite(parameters))


@torch.no_grad()
def _all_finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every element is: a finite gradient can still make an update that is not (0/0 where eps rounds to 0, a
    rate beyond float32). The largest magnitude is NaN if any element is."""
    return math.isfinite(float(nn.utils.get_total_norm(parameters, math.inf)))
