"""The processes that train together: who this one is, and what they add up. One process alone is the identity."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class World(Protocol):
    """Processes that each take their share of every batch and make the same update."""

    @property
    def rank(self) -> int:
        """This process' number, from 0. Only 0 writes files."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def total(self, *numbers: float) -> tuple[float, ...]:
        """Each number, summed over all processes."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        ...

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of process 0."""
        ...

    def barrier(self) -> None:
        """Wait until every process is here."""
        ...


class OneProcess:
    """A world of one."""

    rank, size = 0, 1

    def total(self, *numbers: float) -> tuple[float, ...]:
        """The numbers."""
        return numbers

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to add."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """It is process 0 itself."""

    def barrier(self) -> None:
        """Nobody to wait for."""


ONE_PROCESS = OneProcess()
