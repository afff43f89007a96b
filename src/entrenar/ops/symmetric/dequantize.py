"""Bytes back to numbers: code · scale of the block, multiplied in float32 and rounded once."""

import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.blocks import chunks
from entrenar.ops.registration import call, define
from entrenar.ops.scales import decode_scales, scale_buffers

_dequantize = native.Function("dequantize_int8")


def dequantize_int8(codes: Tensor, scales: list[Tensor], block_size: int, dtype: torch.dtype) -> Tensor:
    """code · scale in float32 (float64 for a float64 result), rounded once.

    Args:
        codes: (n,) uint8, two's complement; scales: as ops/scales.py holds them.
    Returns:
        (n,) `dtype`.
    """
    return call("dequantize_int8", codes, scales, block_size, dtype)


def _reference(codes: Tensor, scales: list[Tensor], block_size: int, dtype: torch.dtype) -> Tensor:
    codes, block_scales = codes.view(torch.int8), decode_scales(scales)
    if dtype == torch.float64:
        block_scales = block_scales.double()
    out = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    for part in chunks(codes.numel(), block_size, codes.device):
        blocks = slice(part.start // block_size, part.stop // block_size)
        out[part].view(-1, block_size).copy_(codes[part].view(-1, block_size) * block_scales[blocks].unsqueeze(1))
    whole = codes.numel() // block_size * block_size
    if whole < codes.numel():
        out[whole:] = codes[whole:] * block_scales[-1:]
    return out


def _native(codes: Tensor, scales: list[Tensor], block_size: int, dtype: torch.dtype) -> Tensor:
    out = _fake(codes, scales, block_size, dtype)
    _dequantize(
        codes.contiguous(), *scale_buffers(scales), out,
        out.numel(), block_size, native.DTYPES[dtype], native.threads(),
    )  # fmt: skip
    return out


def _fake(codes: Tensor, _scales: list[Tensor], _block_size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format)


define(
    "dequantize_int8(Tensor codes, Tensor[] scales, int block_size, ScalarType dtype) -> Tensor",
    reference=_reference,
    native_cpu=_native,
    fake=_fake,
    accepts=lambda _codes, _scales, _block_size, dtype: dtype in native.DTYPES,
)
