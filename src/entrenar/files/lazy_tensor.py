"""A tensor to be written: what the file's header needs is known, the data is made when its turn comes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """The bytes that a GGUF holds a tensor in, of a type (`q4_k`, …): (rows, bytes of a row) uint8, made when asked."""

    type: str
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """Name, shape and a function that makes the data.

    `dtype`: what it is written as, None: as others in its file; `packed`: the same numbers as GGUF blocks, if they are
    there as such too.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    dtype: torch.dtype | None = None
    packed: Packed | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def bytes_as(self, dtype: torch.dtype) -> int:
        """Bytes in a file whose tensors are `dtype` where they do not say."""
        return self.numel * (self.dtype or dtype).itemsize
