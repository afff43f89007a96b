"""A tensor to be written: what the file's header needs is known, the data is made when its turn comes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.core.errors import InputError


@dataclass(frozen=True)
class GGUFBlocks:
    """The bytes that a GGUF holds a tensor in, of a type (`q4_k`, …): (rows, bytes of a row) uint8, made when asked."""

    type: str
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class LazyTensor:
    """Name, shape and a function that makes the data.

    `dtype`: what it is written as, None: as others in its file; `blocks`: the same numbers as GGUF blocks, if they are
    there as such too.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    dtype: torch.dtype | None = None
    blocks: GGUFBlocks | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def bytes_as(self, dtype: torch.dtype) -> int:
        """Bytes in a file whose tensors are `dtype` where they do not say."""
        return self.numel * (self.dtype or dtype).itemsize


def as_float(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`, float32, float16 or bfloat16; `name` of the tensor for the message.

    Raises:
        InputError: a NaN, an infinity, or a number too large for `dtype`, which would become an infinity.
    """
    written = values.to(dtype)
    if _is_finite(written):
        return written
    kind = str(dtype).removeprefix("torch.")
    if not _is_finite(values):
        raise InputError(f"{name} holds a NaN or an infinity, which no model is made of: check the model")
    largest, most = values.abs().max().item(), torch.finfo(dtype).max
    raise InputError(
        f"{name} holds {largest:.6g}, and the largest number of {kind} is {most:.6g}, so an infinity would be written: "
        "choose bf16 or f32"
    )


def _is_finite(values: Tensor) -> bool:
    return not values.numel() or all(bool(end.isfinite()) for end in values.aminmax())
