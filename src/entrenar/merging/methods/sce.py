"""SCE (Wan et al. 2024, "FuseChat", section 3.3): select, calculate, erase.

Select the share `select_topk` of the positions at which the task vectors vary most; calculate a weight for every model
from the mean square of its selected δ; erase what has not the sign of the sum of all δ; average what is left.
"""

import torch
from torch import Tensor

from entrenar.merging.stack import Combine, Options, Piece, Stack
from entrenar.merging.thresholds import Threshold, largest
from entrenar.ops.merge.masks import keep_top
from entrenar.ops.merge.operands import sum_dtype


def sce(stack: Stack, options: Options) -> Combine:
    """See the module."""
    share = float(options["select_topk"])
    threshold = _selection(stack, share) if share < 1 else None
    squares = torch.zeros(len(stack.models), dtype=torch.float64)
    selection = _Selection(threshold)
    for piece in stack.pieces():
        deltas = selection.of(piece, torch.float64)
        squares += deltas.square().sum(1)
    means = squares / max(stack.numel, 1)
    total = means.sum()
    weights = means / total if total.abs() >= 1e-6 else torch.full_like(means, 1 / len(means))
    again = _Selection(threshold)

    def combine(piece: Piece, out: Tensor) -> None:
        assert piece.base is not None
        deltas = again.of(piece, sum_dtype(out))
        sign = torch.where(deltas.sum(0) >= 0, 1, -1)
        shares = weights.to(deltas.dtype)[:, None] * ((deltas * sign > 0) | deltas.isnan())
        moved = (deltas * shares).sum(0) / shares.sum(0).clamp(min=1e-6)
        out.copy_(piece.base.to(deltas.dtype) + moved)

    return combine


class _Selection:
    """Task vectors with zeros wherever they vary less than the threshold; piece by piece, in order."""

    def __init__(self, threshold: Threshold | None) -> None:
        self._threshold = threshold
        self._ties = torch.zeros(1, dtype=torch.int64)

    def of(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        """(m, n) `dtype`."""
        deltas = _deltas(piece, dtype)
        if self._threshold is None:
            return deltas
        if piece.start == 0:
            self._ties.fill_(self._threshold.ties)
        mask = piece.mask(0)
        keep_top(_variance(piece), None, self._threshold.bits, self._ties, mask)
        return deltas.where(mask != 0, 0)


def _selection(stack: Stack, share: float) -> Threshold:
    varying = sum(int(_variance(piece).count_nonzero()) for piece in stack.pieces())
    ((threshold,),) = largest(stack, lambda piece: [(_variance(piece), None)], [[int(varying * share)]])
    return threshold


def _variance(piece: Piece) -> Tensor:
    """(n,) float32: over the models, of δ."""
    return _deltas(piece, torch.float32).var(dim=0, unbiased=False)


def _deltas(piece: Piece, dtype: torch.dtype) -> Tensor:
    assert piece.base is not None
    base = piece.base.to(dtype)
    return torch.stack([model.to(dtype) - base for model in piece.models])
