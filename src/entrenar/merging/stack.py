"""The inputs of one output tensor, read piece by piece: what every merge method works on.

A method is a function (Stack, Options) → Combine. It may go over the pieces as often as it wants for its statistics;
then the combine it returned is called once per piece, in order, with the place for the result.
"""

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from entrenar.ops.merge.masks import Key

PIECE_ELEMENTS = 1 << 20  # of every input; larger ones leave the cache, smaller ones cost time in Python
SAMPLES, SAMPLE_ELEMENTS = 16, 1 << 13  # pieces of a sample, and elements of each


class TensorReader(Protocol):
    """One input tensor of a model."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the pieces: float32, float16, bfloat16 or float64."""
        ...

    @property
    def step(self) -> int:
        """Pieces start at multiples of it."""
        ...

    def read(self, start: int, count: int, scratch: "Scratch", role: Hashable) -> Tensor:
        """(count,): the flat elements from `start`, perhaps in scratch of that role, valid until its next use."""
        ...


class Scratch:
    """Buffers of one thread, by role; each grows to the largest size asked of it and is used again."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}

    def take(self, role: Hashable, count: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """(count,) `dtype`, uninitialised."""
        size = count * dtype.itemsize
        buffer = self._buffers.get(role)
        if buffer is None or buffer.numel() < size:
            self._buffers[role] = buffer = torch.empty(size, dtype=torch.uint8)
        return buffer[:size].view(dtype)


@dataclass(frozen=True)
class MemoryReader:
    """A tensor in memory."""

    flat: Tensor  # (n,)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.flat.dtype

    @property
    def step(self) -> int:
        """Any element may start a piece."""
        return 1

    def read(self, start: int, count: int, scratch: Scratch, role: Hashable) -> Tensor:  # noqa: ARG002 - TensorReader's
        """A view."""
        return self.flat[start : start + count]


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + count) of every input, flat."""

    start: int
    count: int
    models: list[Tensor]
    base: Tensor | None
    scratch: Scratch

    def mask(self, index: int) -> Tensor:
        """(count,) uint8 of scratch for the model `index`."""
        return self.scratch.take(("mask", index), self.count)


Combine = Callable[[Piece, Tensor], None]
"""(piece, out (count,)): the merged elements, rounded once to out's dtype."""

Options = Mapping[str, Any]
"""Every parameter of the method: a value, or for one that each model has of its own a tuple of them."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The inputs of one output tensor.

    Attributes:
        name: of the output tensor; with `seed` and a model's label it is the key of that model's random masks.
        models: without the base.
        labels: of the models.
        whole_rows: whether pieces are to be whole rows.
        statistics: what was measured of each model for this tensor, for a method that asks for it; None: nothing.
    """

    name: str
    shape: tuple[int, ...]
    models: Sequence[TensorReader]
    base: TensorReader | None
    labels: Sequence[str]
    scratch: Scratch
    seed: int = 0
    whole_rows: bool = False
    statistics: Sequence[TensorReader | None] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Length of a row: the last dimension; a vector is one row."""
        return max(self.shape[-1], 1) if self.shape else 1

    def pieces(self) -> Iterator[Piece]:
        """All elements, in order."""
        size = max(PIECE_ELEMENTS // self._step, 1) * self._step
        for start in range(0, self.numel, size):
            yield self._piece(start, min(size, self.numel - start))

    def sample(self) -> Iterator[Piece]:
        """Short pieces from all over the tensor; none of a tensor that is read in one piece, or nearly so."""
        size = -(-SAMPLE_ELEMENTS // self._step) * self._step
        stride = self.numel // SAMPLES // self._step * self._step
        if self.numel > PIECE_ELEMENTS and size < stride:
            for start in range(0, stride * SAMPLES, stride):
                yield self._piece(start, size)

    @property
    def _step(self) -> int:
        """Pieces start at multiples of it."""
        sources = [*self.models, *([] if self.base is None else [self.base])]
        return math.lcm(self.columns if self.whole_rows else 1, *(source.step for source in sources))

    def _piece(self, start: int, count: int) -> Piece:
        models = [source.read(start, count, self.scratch, index) for index, source in enumerate(self.models)]
        base = None if self.base is None else self.base.read(start, count, self.scratch, "base")
        return Piece(start, count, models, base, self.scratch)

    def random_key(self, index: int) -> Key:
        """The key of the random masks of the model `index`."""
        occurrence = list(self.labels[:index]).count(self.labels[index])
        text = "\0".join((str(self.seed), self.name, self.labels[index], str(occurrence)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
