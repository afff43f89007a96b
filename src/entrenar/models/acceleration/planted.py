"""Tensors that stand for what a module's parts compute, and a note of what arrives at each part.

The class's own forward then only moves tensors about, and what arrives must be what was sent, to the last bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SIZE = 1e3  # of the planted numbers: what is clipped somewhere is clipped here


class Planted:
    """Makes planted tensors, and notes what arrived where."""

    def __init__(self, device: torch.device) -> None:
        self._generator, self._device = torch.Generator().manual_seed(0), device
        self.arrived: dict[str, list[Any]] = {}
        self.results: dict[str, Tensor] = {}

    def tensor(self, *shape: int) -> Tensor:
        """A new one, float64."""
        return (torch.randn(*shape, generator=self._generator, dtype=torch.float64) * _SIZE).to(self._device)

    def part(self, name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        """Something callable that notes what it is given."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.arrived.setdefault(name, []).append((args, kwargs))
            return result(*args, **kwargs)

        return call

    def like(self, name: str) -> Callable[..., Tensor]:
        """The same, whose result is planted in the shape of what it is given."""

        def call(x: Tensor) -> Tensor:
            self.results[name] = self.tensor(*x.shape)
            return self.results[name]

        return self.part(name, call)

    def once(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the part was called with, if it was called once."""
        calls = self.arrived.get(name, [])
        return calls[0] if len(calls) == 1 else None


def same(one: Any, other: Any) -> bool:
    """Whether both are tensors, of one shape and equal to the last bit."""
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)
