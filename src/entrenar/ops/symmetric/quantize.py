"""Symmetric integer block quantization: scale = absmax / limit, code = round(clamp(w / scale, −limit, limit))."""

import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.blocks import block_absmax, block_count, chunks
from entrenar.ops.codebook.nibbles import pack_nibbles
from entrenar.ops.registration import call, define

_quantize = native.Function("quantize_symmetric")


def quantize_symmetric(flat: Tensor, limit: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes of flat (n,) float and the scale of each block, (blocks,) float32; a block of zeros gives zeros.

    Args:
        limit: 7 packs two's-complement nibbles, two a byte, (ceil(n/2),) uint8; 127 gives bytes, (n,) uint8.
    """
    return call("quantize_symmetric", flat, limit, block_size)


def _reference(flat: Tensor, limit: int, block_size: int) -> tuple[Tensor, Tensor]:
    scales = block_absmax(flat, block_size) / limit
    codes = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
    for part in chunks(flat.numel(), block_size, flat.device):
        blocks = slice(part.start // block_size, part.stop // block_size)
        codes[part] = _round(flat[part].view(-1, block_size), scales[blocks].unsqueeze(1), limit).flatten()
    whole = flat.numel() // block_size * block_size
    if whole < flat.numel():
        codes[whole:] = _round(flat[whole:], scales[-1], limit)
    raw = codes.view(torch.uint8)
    return pack_nibbles(raw & 15) if limit == 7 else raw, scales


def _round(values: Tensor, scales: Tensor, limit: int) -> Tensor:
    scaled = torch.where(scales > 0, values.float() / scales, 0.0)
    return scaled.clamp_(-limit, limit).round_().to(torch.int8)


def _native(flat: Tensor, limit: int, block_size: int) -> tuple[Tensor, Tensor]:
    codes, scales = _fake(flat, limit, block_size)
    dtype = native.DTYPES[flat.dtype]
    _quantize(flat.contiguous(), codes, scales, flat.numel(), block_size, limit, dtype, native.threads())
    return codes, scales


def _fake(flat: Tensor, limit: int, block_size: int) -> tuple[Tensor, Tensor]:
    codes = flat.new_empty(block_count(flat.numel(), 2 if limit == 7 else 1), dtype=torch.uint8)
    return codes, flat.new_empty(block_count(flat.numel(), block_size), dtype=torch.float32)


def _accepts(flat: Tensor, limit: int, block_size: int) -> bool:
    return flat.dtype in native.DTYPES and (limit == 127 or block_size % 2 == 0)


define(
    "quantize_symmetric(Tensor flat, int limit, int block_size) -> (Tensor, Tensor)",
    reference=_reference,
    native_cpu=_native,
    fake=_fake,
    accepts=_accepts,
)
