"""A tensor to be written: what the file's header needs is known, the data is made when its turn comes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """The bytes that a GGUF holds a tensor in, of a type (`q4_k`, …): (rows, bytes of a row) uint8, made when asked."""

    type: str
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """Name, shape and a function that makes the data; `packed` where the same numbers are there as GGUF blocks too."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    packed: Packed | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
