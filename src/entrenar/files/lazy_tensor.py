"""A tensor to be written: what the file's header needs is known, the data is made when its turn comes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """Name, shape and a function that makes the data."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)
