"""Blocks over a flat tensor: whole blocks first, then at most one partial block at the end."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Work on about this many elements at a time: on a CPU temporaries then stay in cache and in reused memory; a GPU wants
# few and large kernels.
CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 19, 1 << 24


def chunk_elements(device: torch.device) -> int:
    """How many elements a reference works on at a time."""
    return CHUNK_ELEMENTS if device.type == "cpu" else _GPU_CHUNK_ELEMENTS


def block_count(count: int, block_size: int) -> int:
    """Number of blocks, the partial one included."""
    return -(-count // block_size)


def chunks(count: int, block_size: int, device: torch.device) -> Iterator[slice]:
    """Element ranges that cover the whole blocks of a flat tensor, each a whole number of blocks (even-sized)."""
    whole = count // block_size * block_size
    step = max(chunk_elements(device) // (2 * block_size), 1) * 2 * block_size
    for start in range(0, whole, step):
        yield slice(start, min(start + step, whole))


def block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """Largest magnitude of every block. flat (n,) any float dtype → (blocks,) float32."""
    count = flat.numel()
    whole = count // block_size * block_size
    parts = [flat[part].view(-1, block_size).abs().amax(dim=1) for part in chunks(count, block_size, flat.device)]
    if whole < count:
        parts.append(flat[whole:].abs().amax().view(1))
    return torch.cat(parts).float() if parts else flat.new_empty(0, dtype=torch.float32)
