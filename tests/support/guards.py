"""Buffers whose surroundings a kernel must not touch."""

import torch
from torch import Tensor

GUARD = 256


def guarded(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer for a result, and the raw bytes around it."""
    raw = torch.full((count * dtype.itemsize + 2 * GUARD,), 0xA5, dtype=torch.uint8)
    return raw[GUARD : GUARD + count * dtype.itemsize].view(dtype), raw


def assert_guard(raw: Tensor) -> None:
    assert (raw[:GUARD] == 0xA5).all()
    assert (raw[-GUARD:] == 0xA5).all()
