"""Blocks over a flat tensor: whole blocks first, then at most one partial block at the end."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Work on about this many elements at a time: temporaries stay in cache and in reused memory.
CHUNK_ELEMENTS = 1 << 19


def block_count(count: int, block_size: int) -> int:
    """Number of blocks, the partial one included."""
    return -(-count // block_size)


def chunks(count: int, block_size: int) -> Iterator[slice]:
    """Element ranges that cover the whole blocks of a flat tensor, each a whole number of blocks (even-sized)."""
    whole = count // block_size * block_size
    step = max(CHUNK_ELEMENTS // (2 * block_size), 1) * 2 * block_size
    for start in range(0, whole, step):
        yield slice(start, min(start + step, whole))


def block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """Largest magnitude of every block. flat (n,) any float dtype → (blocks,) float32."""
    count = flat.numel()
    whole = count // block_size * block_size
    parts = [flat[part].view(-1, block_size).abs().amax(dim=1) for part in chunks(count, block_size)]
    if whole < count:
        parts.append(flat[whole:].abs().amax().view(1))
    return torch.cat(parts).float() if parts else flat.new_empty(0, dtype=torch.float32)
