"""Arcee Fusion: take over only the changes that matter.

The importance of an element is |δ| times its row's Kullback-Leibler divergence between the softmaxes of model and base.
Kept is what reaches median + 1.5 · (third quartile − first quartile) of the tensor's importances. Median and quartiles
are entries, the lower one where they fall between two.
"""

from torch import Tensor

from entrenar.merging.stack import Combine, Options, Piece, Stack
from entrenar.merging.thresholds import largest
from entrenar.ops.merge.operands import sum_dtype


def arcee_fusion(stack: Stack, options: Options) -> Combine:  # noqa: ARG001 - a method's signature
    """See the module."""
    limit = _limit(stack) if stack.numel else 0.0

    def combine(piece: Piece, out: Tensor) -> None:
        assert piece.base is not None
        base = piece.base.to(sum_dtype(out))
        delta = piece.models[0].to(base.dtype) - base
        out.copy_(base + delta.where((_importance(piece, stack.columns) >= limit) | delta.isnan(), 0))

    return combine


def _limit(stack: Stack) -> float:
    n = stack.numel
    ranks = (int((n - 1) * share) for share in (0.5, 0.25, 0.75))  # ascending, from 0
    series = lambda piece: [(_importance(piece, stack.columns), None)]  # noqa: E731
    ((median, first, third),) = largest(stack, series, [[n - rank for rank in ranks]])
    return median.value + 1.5 * (third.value - first.value)


def _importance(piece: Piece, columns: int) -> Tensor:
    """(n,) float32."""
    assert piece.base is not None
    model, base = (tensor.float().view(-1, columns) for tensor in (piece.models[0], piece.base))
    model_log, base_log = (tensor.log_softmax(dim=1) for tensor in (model, base))
    divergence = (model_log.exp() * (model_log - base_log)).sum(dim=1, keepdim=True).clamp(min=0)
    return ((model - base).abs() * divergence).view(-1)
