"""Methods that weigh each parameter by what a text says about it: Fisher-weighted averages, regression means.

The statistics of every model come with the stack (evaluation/weight_statistics.py measures them).
"""

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.merging.methods.linear import linear
from entrenar.merging.stack import Combine, Options, Piece, Stack, TensorReader

_RIDGE = 1e-6  # of the mean of a diagonal: directions that no input has are averaged


def fisher(stack: Stack, options: Options) -> Combine:
    """Σ weight · F · x / Σ weight · F with F the mean squared gradient (Matena and Raffel 2022, equation 2).

    Where every F is 0, nothing tells the models apart: there it is the weighted mean.
    """
    weights = _shares(stack, options)
    sources = [_needed(stack, index, source) for index, source in enumerate(stack.statistics)]

    def combine(piece: Piece, out: Tensor) -> None:
        total, divisor, mean = (torch.zeros(piece.count, dtype=torch.float64) for _ in range(3))
        for index, (weight, source, values) in enumerate(zip(weights, sources, piece.models, strict=True)):
            share = source.read(piece.start, piece.count, piece.scratch, ("statistic", index)).double() * weight
            total.addcmul_(share, values.double())
            divisor += share
            mean.add_(values, alpha=weight)
        out.copy_(torch.where(divisor > 0, total / divisor, mean))

    return combine


def regmean(stack: Stack, options: Options) -> Combine:
    """(Σ weight · W·G)(Σ weight · G)⁻¹ with G = XᵀX, off its diagonal times alpha (RegMean, Jin et al. 2023, eq. 2).

    Of all linear layers the one nearest to each model's outputs on its own inputs. What is not the weight of a linear
    layer has no inputs in this sense, and is averaged.
    """
    weights = _shares(stack, options)
    if len(stack.shape) != 2 or all(source is None for source in stack.statistics):
        return linear(stack, {"weight": weights, "normalize": False})
    columns = stack.columns
    products = []
    for index, (weight, source) in enumerate(zip(weights, stack.statistics, strict=True)):
        statistic = _needed(stack, index, source)
        products.append(
            _smoothed(statistic.read(0, columns * columns, stack.scratch, "statistic"), columns, options["alpha"])
        )
        products[-1] *= weight
    factor, failed = torch.linalg.cholesky_ex(torch.stack(products).sum(0))
    if failed:
        raise InputError(
            f"regmean: the inputs of {stack.name} leave nothing to solve for: give a longer text, or an alpha below 1"
        )

    def combine(piece: Piece, out: Tensor) -> None:
        rows = [values.view(-1, columns).double() for values in piece.models]
        right = torch.stack([row @ product for row, product in zip(rows, products, strict=True)]).sum(0)
        out.copy_(torch.cholesky_solve(right.t(), factor).t().reshape(-1))

    return combine


def _smoothed(flat: Tensor, columns: int, alpha: float) -> Tensor:
    """G (columns, columns) float64, made surely positive."""
    product = flat.view(columns, columns).double()
    diagonal = product.diagonal().clone()
    product *= alpha
    product.diagonal().copy_(diagonal + _RIDGE * diagonal.mean())
    return product


def _shares(stack: Stack, options: Options) -> tuple[float, ...]:
    """The weights over their sum."""
    weights: tuple[float, ...] = options["weight"]
    if not sum(weights) > 0:
        raise InputError(f"the weights of {stack.name} add up to 0: give one above 0")
    return tuple(weight / sum(weights) for weight in weights)


def _needed(stack: Stack, index: int, source: TensorReader | None) -> TensorReader:
    if source is None:
        raise InputError(
            f"nothing was measured about {stack.name} in {stack.labels[index]}: its weights are not those of a model "
            "that transformers makes of its config"
        )
    return source
