"""A tensor to be written: what the file's header needs is known, the data is made when its turn comes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """Name, shape and a function that makes the data; `dtype`: what it is written as, None: as others in its file."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def bytes_as(self, dtype: torch.dtype) -> int:
        """Bytes in a file whose tensors are `dtype` where they do not say."""
        return self.numel * (self.dtype or dtype).itemsize
