"""Summed cross-entropy behind an output head, a chunk of positions at a time: the (N, V) logits never exist.

A chunk's gradient is made in the forward pass, while its logits are at hand, and the backward only scales what was
kept: d_hidden (N, H) and the gradients of what is trained in the head (Liger Kernel, Hsu et al. 2024, "fused linear
cross entropy"). Letters: N positions, n positions of a chunk, H hidden size, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from entrenar import native
from entrenar.layers.adapted_native import AdaptedLinear
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.ops.cross_entropy.operation import cross_entropy_rows
from entrenar.ops.linear.multiply import product_into

LOGIT_BYTES = 64 << 20  # of one chunk, in the compute dtype; a CPU repacks the weight for each, so few rows are slow

Gradients = dict[str, Tensor]  # parameter of the head → what belongs to it
# hidden (n, H), labels (n,), d_hidden (n, H) to fill or None, gradients to add to → the losses (n,) of the chunk.
_Step = Callable[[Tensor, Tensor, Tensor | None, Gradients], Tensor]


@dataclass(frozen=True)
class Segments:
    """Which sequence each of N positions belongs to: `of` (N,) int64, below `count`. Sums are taken within each."""

    of: Tensor
    count: int

    def to(self, device: torch.device) -> "Segments":
        """The same on a device."""
        return Segments(self.of.to(device), self.count)

    def sums(self, losses: Tensor, part: slice = slice(None)) -> Tensor:
        """(count,) float64: the losses (n,) of some positions, added up within each sequence."""
        total = losses.new_zeros(self.count, dtype=torch.float64)
        return total.index_add(0, self.of[part], losses.to(torch.float64))


@dataclass(frozen=True)
class LogitRule:
    """What an architecture does to the head's output z: softcap · tanh(scale · z / softcap), or scale · z.

    Softcapping: Gemma 2 (2024), section 2. Scaling: Cohere, Granite.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply it; dtype and shape stay."""
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def linear_cross_entropy(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    vocabulary: int,
    rule: LogitRule = LogitRule(),
    segments: Segments | None = None,
) -> Tensor:
    """Cross-entropy of rule(head(hidden)), summed: rows in float32 (float64 for float64), their sum () in float64.

    With `segments` the sums of every sequence, (S,) float64. Then a head that is trained is computed twice, as its
    gradient depends on how the sums are weighted, which only the backward knows.

    Differentiable once; gradient reaches `hidden` and the parameters of the head that require it. The head's hooks do
    not run.

    Args:
        hidden: (N, H), in the compute dtype. head: from (n, H) to (n, V). labels: (N,) int64. vocabulary: V.
    """
    rows = chunk_rows(len(hidden), vocabulary, hidden.dtype)
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    if not (torch.is_grad_enabled() and (hidden.requires_grad or trained)):
        return _loss_alone(hidden, head, labels, rows, rule, segments)
    if segments and trained:
        return chunked_loss(lambda part: rule(_wide(head.forward(part))), hidden, labels, rows, segments)
    if type(head) is nn.Linear and head.weight.dtype == hidden.dtype:
        step = _linear_step(head, rule, _logit_scratch(hidden, rows, head.out_features))
    elif type(head) is QuantizedLinear:
        step = _frozen_step(head.member(), rule)
    else:
        step = _autograd_step(head, rule, list(trained.values()))
    loss = _SummedLoss.apply(step, rows, tuple(trained), segments, hidden, labels, *trained.values())
    assert isinstance(loss, Tensor)  # tells the type checker what apply() returns
    return loss


def _logit_scratch(hidden: Tensor, rows: int, vocabulary: int) -> Tensor:
    """(rows, V), where the kernels may be at work before and after the loss: in a heap that smaller tensors have cut
    up, so large a block would find room at the end only, and the process would hold it twice."""
    if hidden.dtype in native.DTYPES and native.available() and native.is_eager(hidden):
        return native.scratch(rows * vocabulary, hidden.dtype).view(rows, vocabulary)
    return hidden.new_empty(rows, vocabulary)


def summed_cross_entropy(
    logits: Tensor, labels: Tensor, segments: Segments | None = None, part: slice = slice(None)
) -> Tensor:
    """Of whole logits (n, V) and labels (n,), by PyTorch: rows in float32 at least, their sum in float64; with segments
    the sums (S,) of every sequence, the rows being the `part` of its positions."""
    losses = F.cross_entropy(_wide(logits), labels, reduction="none")
    return segments.sums(losses, part) if segments else losses.sum(dtype=torch.float64)


def chunked_loss(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, rows: int, segments: Segments | None
) -> Tensor:
    """`summed_cross_entropy` of logits(hidden), `rows` positions at a time; they are made once more in the backward."""

    def loss(hidden: Tensor, labels: Tensor, part: slice) -> Tensor:
        return summed_cross_entropy(logits(hidden), labels, segments, part)

    parts = [slice(start, start + rows) for start in range(0, len(hidden), rows)]
    sums = [checkpoint(loss, hidden[part], labels[part], part, use_reentrant=False) for part in parts]
    return torch.stack(cast(list[Tensor], sums)).sum(0)


def chunk_rows(positions: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Positions in a chunk, so that its logits fit LOGIT_BYTES; the chunks are about equally large."""
    fitting = max(LOGIT_BYTES // (vocabulary * dtype.itemsize), 1)
    return math.ceil(positions / math.ceil(positions / fitting)) if positions else 1


def _losses_and_gradient(logits: Tensor, labels: Tensor, rule: LogitRule) -> Tensor:
    """The losses (n,) of the head's output (n, V), which their gradient overwrites."""
    if rule.scale != 1:
        logits.mul_(rule.scale)
    losses = cross_entropy_rows(logits, labels, rule.softcap or 0.0)
    if rule.scale != 1:
        logits.mul_(rule.scale)
    return losses


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least: what losses are computed in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _loss_alone(
    hidden: Tensor, head: nn.Module, labels: Tensor, rows: int, rule: LogitRule, segments: Segments | None
) -> Tensor:
    total = hidden.new_zeros((segments.count,) if segments else (), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            total += summed_cross_entropy(rule(_wide(head.forward(hidden[part]))), labels[part], segments, part)
    return total


class _SummedLoss(torch.autograd.Function):
    """`trained` are the head's parameters that want a gradient, `names` what the head calls them; with segments there
    are none."""

    @staticmethod
    def forward(
        ctx: Any,
        step: _Step,
        rows: int,
        names: tuple[str, ...],
        segments: Segments | None,
        hidden: Tensor,
        labels: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        ctx.segments = segments
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[4] else None
        gradients = {name: torch.zeros_like(parameter) for name, parameter in zip(names, trained, strict=True)}
        total = hidden.new_zeros((segments.count,) if segments else (), dtype=torch.float64)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            losses = step(hidden[part], labels[part], None if d_hidden is None else d_hidden[part], gradients)
            total += segments.sums(losses, part) if segments else losses.sum(dtype=torch.float64)
        ctx.save_for_backward(d_hidden, *gradients.values())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        if ctx.segments:  # every position's gradient is weighted as its sequence's sum is
            grad = grad[ctx.segments.of, None]
        d_hidden, *d_trained = (None if saved is None else _scaled(saved, grad) for saved in ctx.saved_tensors)
        return None, None, None, None, d_hidden, None, *d_trained


def _scaled(saved: Tensor, grad: Tensor) -> Tensor:
    """In the dtype of what was saved; `grad` is float64."""
    return saved * (grad.to(saved.dtype) if grad.dim() else grad)


def _linear_step(head: nn.Linear, rule: LogitRule, scratch: Tensor) -> _Step:
    """For a plain linear layer: all chunks share the logits' memory, `scratch` (rows, V)."""
    weight, bias = head.weight, head.bias

    def step(hidden: Tensor, labels: Tensor, d_hidden: Tensor | None, gradients: Gradients) -> Tensor:
        logits = scratch[: len(hidden)]
        product_into(logits, hidden, weight, transposed=True)
        if bias is not None:
            logits += bias
        losses = _losses_and_gradient(logits, labels, rule)
        if d_hidden is not None:
            product_into(d_hidden, logits, weight, transposed=False)
        if "weight" in gradients:
            gradients["weight"].addmm_(logits.t(), hidden)
        if "bias" in gradients:
            gradients["bias"] += logits.sum(0)
        return losses

    return step


def _frozen_step(head: AdaptedLinear, rule: LogitRule) -> _Step:
    """For a head that is held quantized: nothing in it is trained."""

    def step(hidden: Tensor, labels: Tensor, d_hidden: Tensor | None, _gradients: Gradients) -> Tensor:
        logits = head.weight.product(hidden, None if head.bias is None else head.bias.to(hidden.dtype))
        losses = _losses_and_gradient(logits, labels, rule)
        if d_hidden is not None:
            d_hidden.copy_(head.weight.transposed_product(logits))
        return losses

    return step


def _autograd_step(head: nn.Module, rule: LogitRule, trained: Sequence[Tensor]) -> _Step:
    """For any other layer (adapted, or of a class of its own): autograd inside the chunk."""

    def step(hidden: Tensor, labels: Tensor, d_hidden: Tensor | None, gradients: Gradients) -> Tensor:
        with torch.enable_grad():
            inner = hidden.detach().requires_grad_()
            output = head.forward(inner)
        logits = output.detach().clone()  # the graph may need its output as it is
        losses = _losses_and_gradient(logits, labels, rule)
        d_inner, *d_trained = torch.autograd.grad(output, [inner, *trained], logits)
        if d_hidden is not None:
            d_hidden.copy_(d_inner)
        for total, part in zip(gradients.values(), d_trained, strict=True):
            total += part
        return losses

    return step
