"""Weighted averages (Wortsman et al. 2022, "Model soups") and one model passed through."""

from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.merging.stack import Combine, Options, Piece, Stack
from entrenar.ops.merge.sums import weighted_sum

_CANCELLED = 2.0**-24  # of what was added: nothing is left in float32, and dividing by it makes numbers of nothing


def linear(stack: Stack, options: Options) -> Combine:
    """Σ weight · x, over Σ weight with `normalize`."""
    weights: tuple[float, ...] = options["weight"]
    total = sum(weights) if options["normalize"] else 1.0
    if total == 0 or abs(total) < _CANCELLED * sum(map(abs, weights)):
        raise InputError(f"linear: the weights of {stack.name} add up to 0: change one, or set normalize: false")
    return weighted([weight / total for weight in weights])


def passthrough(stack: Stack, options: Options) -> Combine:  # noqa: ARG001 - a method's signature
    """The only model's tensor, times `scale` if it has one."""
    (scale,) = options["scale"]
    return weighted([1.0 if scale is None else scale])


def weighted(coefficients: list[float]) -> Combine:
    """Σ coefficients · models."""

    def combine(piece: Piece, out: Tensor) -> None:
        if coefficients == [1.0] and piece.models[0].dtype == out.dtype:
            out.copy_(piece.models[0])  # to the bit, NaN's payload too
        else:
            weighted_sum(piece.models, coefficients, out)

    return combine
