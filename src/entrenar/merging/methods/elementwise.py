"""Methods that look at one element of every input and nothing else: nearswap, ram."""

from torch import Tensor

from entrenar.merging.stack import Combine, Options, Piece, Stack
from entrenar.ops.merge.operands import sum_dtype


def nearswap(stack: Stack, options: Options) -> Combine:  # noqa: ARG001 - a method's signature
    """The base, moved towards the other model by min(1, t / |δ|) of the way: the nearer, the farther it goes."""
    t = float(options["t"])

    def combine(piece: Piece, out: Tensor) -> None:
        base, (delta,) = _deltas(piece, out)
        share = (t / delta.abs().clamp(min=1e-6)).clamp(0, 1)
        out.copy_(base + share * delta)

    return combine


def ram(stack: Stack, options: Options) -> Combine:  # noqa: ARG001 - a method's signature
    """The base and, per element, the mean of the task vectors that change it by more than `epsilon`.

    Reinforced agent merging (arXiv 2601.13572): what one model alone has changed is kept whole.
    """
    epsilon = float(options["epsilon"])

    def combine(piece: Piece, out: Tensor) -> None:
        base, deltas = _deltas(piece, out)
        total, count = base.new_zeros(piece.count), base.new_zeros(piece.count)
        for delta in deltas:
            changed = (delta.abs() > epsilon) | delta.isnan()
            total += delta.where(changed, 0)
            count += changed
        out.copy_(base + total / count.clamp(min=1))

    return combine


def _deltas(piece: Piece, out: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The base and x − base of every model, wide."""
    assert piece.base is not None
    base = piece.base.to(sum_dtype(out))
    return base, [model.to(base.dtype) - base for model in piece.models]
