"""Sums over the models of a merge: weighted, of task vectors with sign consensus, Gram matrices, magnitudes.

What goes to a 16-bit result is summed in float32, else in float64, and rounded once; sums over a whole tensor are
float64. Letters: n elements of a piece, m models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.merge.operands import difference, dtype_code, is_native, rows, sum_dtype

_weighted_sum = native.Function("merge_weighted_sum")
_task_sum = native.Function("merge_task_sum")
_gram = native.Function("merge_gram")
_absolute_sums = native.Function("merge_absolute_sums")


def weighted_sum(
    tensors: Sequence[Tensor],  # m × (n,) float
    coefficients: Sequence[float],
    out: Tensor,  # (n,) float
) -> None:
    """out = Σ coefficients · tensors, in the order given."""
    if is_native(*tensors, out):
        factors = torch.tensor(coefficients, dtype=torch.float64)
        _weighted_sum(rows(tensors), factors, len(tensors), out.numel(), out, dtype_code(out))
        return
    total = torch.zeros(out.shape, dtype=sum_dtype(out))
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        total += tensor.to(total.dtype) * torch.tensor(coefficient, dtype=total.dtype)
    out.copy_(total)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """How task vectors are summed: y = base + scale · M.

    Attributes:
        values: factor of each δ in M.
        votes: factor of each δ in the election of a sign; None: no election, all are summed.
        divisors: what each model adds to the divisor of M where its vote has the elected sign; None: no division.
        zero_is_positive: whether a vote of exactly 0 elects plus, or nobody.
    """

    values: Sequence[float]
    votes: Sequence[float] | None = None
    divisors: Sequence[float] | None = None
    zero_is_positive: bool = True
    scale: float = 1.0


def task_sum(
    base: Tensor | None,  # (n,) float
    tensors: Sequence[Tensor],  # m × (n,) float
    masks: Sequence[Tensor | None],  # m × (n,) uint8; None: all kept
    vote: Vote,
    out: Tensor,  # (n,) float
) -> None:
    """out = base + scale · Σ values · δ over the kept ones (over Σ divisors), δ = (tensor − base) where mask."""
    if not is_native(base, *tensors, out):
        _task_sum_reference(base, tensors, masks, vote, out)
        return
    zeros = [0.0] * len(tensors)
    factors = torch.tensor([vote.values, vote.votes or zeros, vote.divisors or zeros], dtype=torch.float64)
    flags = (vote.votes is not None) + 2 * (vote.divisors is not None) + 4 * vote.zero_is_positive
    _task_sum(
        base, dtype_code(base), rows(tensors, masks), factors.T.contiguous(), len(tensors), out.numel(),
        torch.tensor([vote.scale], dtype=torch.float64), flags, out, dtype_code(out),
    )  # fmt: skip


def _task_sum_reference(
    base: Tensor | None, tensors: Sequence[Tensor], masks: Sequence[Tensor | None], vote: Vote, out: Tensor
) -> None:
    real = sum_dtype(out)
    start = torch.zeros(out.shape, dtype=real) if base is None else base.to(real)
    deltas = [tensor.to(real) - start for tensor in tensors]
    deltas = [delta if mask is None else delta * mask for delta, mask in zip(deltas, masks, strict=True)]
    total, divisor, sign = torch.zeros_like(start), torch.zeros_like(start), None
    if vote.votes is not None:
        elected = torch.zeros_like(start)
        for delta, weight in zip(deltas, vote.votes, strict=True):
            elected += _real(weight, real) * delta
        sign = torch.where(elected > 0, 1.0, torch.where(elected < 0, -1.0, float(vote.zero_is_positive))).to(real)
    for index, delta in enumerate(deltas):
        value = _real(vote.values[index], real) * delta
        if vote.votes is None or sign is None:
            total += value
            continue
        elected_alike = (_real(vote.votes[index], real) * delta * sign > 0).to(real)  # a factor: a NaN is never hidden
        total += value * elected_alike
        if vote.divisors is not None:
            divisor += _real(vote.divisors[index], real) * elected_alike
    if vote.divisors is not None:
        total /= torch.where(divisor == 0, 1, divisor)
    out.copy_(start + _real(vote.scale, real) * total)


def _real(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def add_gram(
    tensors: Sequence[Tensor],  # m × (n,) float
    base: Tensor | None,  # (n,)
    gram: Tensor,  # (m, m) float64; its lower triangle is added to
) -> None:
    """gram += δ · δᵀ with δ = tensor − base, in float64."""
    if is_native(base, *tensors):
        count = tensors[0].numel()
        _gram(rows(tensors), len(tensors), base, dtype_code(base), count, gram)
        return
    wide = [tensor.double() if base is None else tensor.double() - base.double() for tensor in tensors]
    stacked = torch.stack(wide)
    gram += torch.tril(stacked @ stacked.T)


def add_absolute_sums(
    x: Tensor,  # (n,) float
    base: Tensor | None,  # (n,)
    mask: Tensor,  # (n,) uint8
    sums: Tensor,  # (2,) float64, added to
) -> None:
    """sums += Σ |δ|, and Σ |δ| where the mask is not 0."""
    if is_native(x, base):
        _absolute_sums(x, dtype_code(x), base, dtype_code(base), mask, x.numel(), sums)
        return
    size = difference(x, base).abs().double()
    sums += torch.stack([size.sum(), size[mask != 0].sum()])
