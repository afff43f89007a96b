"""Symmetric integer block quantization: q = round(clamp(w / scale, −limit, limit)), scale = absmax / limit."""

import torch
from torch import Tensor

from entrenar.ops.blocks import chunks


def quantize_symmetric(flat: Tensor, scales: Tensor, limit: int, block_size: int) -> Tensor:
    """Signed codes of flat (n,) float under scales (blocks,) float32 → (n,) int8; a block of scale 0 gives zeros."""
    codes = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
    for part in chunks(flat.numel(), block_size):
        blocks = slice(part.start // block_size, part.stop // block_size)
        codes[part] = _round(flat[part].view(-1, block_size), scales[blocks].unsqueeze(1), limit).flatten()
    whole = flat.numel() // block_size * block_size
    if whole < flat.numel():
        codes[whole:] = _round(flat[whole:], scales[-1], limit)
    return codes


def _round(values: Tensor, scales: Tensor, limit: int) -> Tensor:
    scaled = torch.where(scales > 0, values.float() / scales, 0.0)
    return scaled.clamp_(-limit, limit).round_().to(torch.int8)


def dequantize_symmetric(codes: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """code · scale in float32, rounded once. codes (n,) int8, scales (blocks,) float32 → (n,) `dtype`."""
    if dtype == torch.float64:
        scales = scales.double()
    out = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    for part in chunks(codes.numel(), block_size):
        blocks = slice(part.start // block_size, part.stop // block_size)
        out[part].view(-1, block_size).copy_(codes[part].view(-1, block_size) * scales[blocks].unsqueeze(1))
    whole = codes.numel() // block_size * block_size
    if whole < codes.numel():
        out[whole:] = codes[whole:] * scales[-1]
    return out
