"""4-bit block quantization with a codebook of 16 values (QLoRA, Dettmers et al. 2023, section 3).

value = codebook[code] · scale of the block. The arithmetic follows bitsandbytes' CPU path operation by operation, so
that codes are equal to the byte: a whole block is multiplied by the reciprocal of its absmax, a partial last block is
divided by it.
"""

import torch
from torch import Tensor

from entrenar.ops.blocks import chunks
from entrenar.ops.nibbles import pack_nibbles, unpack_nibbles

# bitsandbytes' guard against division by zero; a partial block of zeros also stores it as its absmax.
TINY = 1e-38


def quantize_codebook(flat: Tensor, absmax: Tensor, codebook: Tensor, block_size: int) -> Tensor:
    """Codes of the nearest codebook entries of flat / absmax, ties towards the smaller entry.

    Args:
        flat: (n,) float; absmax: (blocks,) float32; codebook: (16,) float32, in any order.
    Returns:
        (ceil(n/2),) uint8, two codes a byte.
    """
    order = torch.argsort(codebook, stable=True).to(torch.uint8)
    ascending = codebook[order.long()]
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    for part in chunks(flat.numel(), block_size):
        blocks = slice(part.start // block_size, part.stop // block_size)
        reciprocal = (1.0 / absmax[blocks].clamp(min=TINY)).unsqueeze(1)
        codes[part] = _nearest((flat[part].float().view(-1, block_size) * reciprocal).flatten(), midpoints, order)
    whole = flat.numel() // block_size * block_size
    if whole < flat.numel():
        codes[whole:] = _nearest(flat[whole:].float() / absmax[-1].clamp(min=TINY), midpoints, order)
    return pack_nibbles(codes, spare=int(_nearest(torch.zeros(1), midpoints.cpu(), order.cpu())))


def _nearest(scaled: Tensor, midpoints: Tensor, order: Tensor) -> Tensor:
    return order[torch.bucketize(scaled.clamp_(-1, 1), midpoints, out_int32=True)]


def dequantize_codebook(
    packed: Tensor, scales: Tensor, codebook: Tensor, block_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    """codebook[code] · scale, multiplied in float32 (float64 for a float64 result) and rounded once to `dtype`.

    Args:
        packed: (ceil(count/2),) uint8; scales: (blocks,) float32; codebook: (16,) float32.
    Returns:
        (count,) `dtype`.
    """
    if dtype == torch.float64:
        scales = scales.double()
    out = torch.empty(count, dtype=dtype, device=packed.device)
    pairs = _byte_pairs(codebook)
    for part in chunks(count, block_size):
        values = pairs.index_select(0, packed[part.start // 2 : part.stop // 2].int()).view(torch.float32)
        blocks = slice(part.start // block_size, part.stop // block_size)
        out[part].view(-1, block_size).copy_(values.view(-1, block_size) * scales[blocks].unsqueeze(1))
    whole = count // block_size * block_size
    if whole < count:
        codes = unpack_nibbles(packed[whole // 2 :], count - whole)
        out[whole:] = codebook[codes.long()] * scales[-1:]  # 1-D: a 0-D float64 would not widen the product
    return out


def _byte_pairs(codebook: Tensor) -> Tensor:
    """For each byte the two float32 values of its nibbles, as one int64, so that one gather yields two elements."""
    pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1)
    return pairs.contiguous().view(torch.int64).flatten()
