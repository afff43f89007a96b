"""The rotation of queries and keys by their positions: which function of a class it is, and whether ours does the same.

It is known by what it is handed, the cosines and sines of the call, not by what it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import update_wrapper
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from entrenar.models.acceleration.other_globals import global_functions, with_globals
from entrenar.ops.elementwise.rotary import rotary

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k, cos, sin → q, k
_HEADS = 4, 2  # of planted q and k


@dataclass(frozen=True)
class Rotation:
    """The function that a forward rotates with, and the global variable it finds it in."""

    variable: str
    rotate: Rotate


class RotationSpy:
    """Watches a forward's global functions for the one that is handed q, k and the call's very cos and sin.

    Args:
        forward: of an attention class. position_embeddings: of the call to come, (cos, sin); None: none is handed on.
        stand_in: is called in the rotation's place; None: the rotation itself.
    """

    def __init__(self, forward: Any, position_embeddings: Any, stand_in: Rotate | None = None) -> None:
        self._rotation = position_embeddings if isinstance(position_embeddings, tuple) else ()
        self._stand_in = stand_in
        self.calls: list[tuple[Rotation, Tensor, Tensor]] = []  # with the q and k that it was handed
        functions = global_functions(forward) if len(self._rotation) == 2 else {}
        spies = {variable: self._watched(variable, function) for variable, function in functions.items()}
        self.forward: Callable[..., Any] = with_globals(forward, spies) if spies else forward

    def _watched(self, variable: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs or len(args) != 4 or any(a is not b for a, b in zip(args[2:], self._rotation, strict=True)):
                return function(*args, **kwargs)
            self.calls.append((Rotation(variable, function), args[0], args[1]))
            return (self._stand_in or function)(*args)

        return update_wrapper(call, function)

    @property
    def rotation(self) -> Rotation | None:
        """What the forward rotated with, once, in the calls that were watched; None if nothing or more than that."""
        return self.calls[0][0] if len(self.calls) == 1 else None


def rotating_by(forward: Any, rotation: Rotation | None, rotate: Rotate) -> Any:
    """The same forward with another function in place of its rotation; the forward itself if it has none."""
    if rotation is None or not isinstance(forward, FunctionType):
        return forward
    return with_globals(forward, {rotation.variable: rotate})


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D) and k (B, G, T, D) rotated; views of (B, T, heads, D)."""
    rotated_q, rotated_k = (rotary(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
    return rotated_q, rotated_k


def not_rotated(q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation of q and k that are rotated already."""
    return q, k


@torch.no_grad()
def rotates_halves(rotate: Rotate, width: int, rotated: int) -> bool:
    """Whether a function rotates as ops/elementwise/rotary.py does: in float64, every element.

    Args:
        width: of a head. rotated: how many numbers of each head the cosines and sines are for.
    """
    generator = torch.Generator().manual_seed(0)

    def planted(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (planted(2, heads, 3, width) * 1e3 for heads in _HEADS)
    cos, sin = planted(2, 3, rotated), planted(2, 3, rotated)  # whose halves differ
    try:
        expected = rotate(q, k, cos, sin)
    except Exception:  # it takes something else
        return False
    return all(_close(one, other) for one, other in zip(rotate_both(q, k, cos, sin), expected, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, 1e-9, 1e-9)
