"""4-bit block quantization with a codebook of 16 values (QLoRA, Dettmers et al. 2023, section 3).

code = nearest entry to w / absmax of the block. The arithmetic follows bitsandbytes' CPU path operation by
operation, so that codes are equal to the byte: a whole block is multiplied by the reciprocal of its absmax, a partial
last block is divided by it.
"""

import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.blocks import block_absmax, block_count, chunks
from entrenar.ops.codebook.nibbles import pack_nibbles
from entrenar.ops.registration import call, define

# bitsandbytes' guard against division by zero; a partial block of zeros also stores it as its absmax.
TINY = 1e-38

_quantize = native.Function("quantize_codebook")


def quantize_codebook(flat: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes of the nearest codebook entries of flat / absmax, ties towards the smaller entry.

    Args:
        flat: (n,) float; codebook: (16,) float32 in [−1, 1], in any order.
    Returns:
        (ceil(n/2),) uint8, two codes a byte, and the absmax of each block, (blocks,) float32.
    """
    return call("quantize_codebook", flat, codebook, block_size)


def _reference(flat: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    absmax = block_absmax(flat, block_size)
    if flat.numel() % block_size:
        absmax[-1].clamp_(min=TINY)
    order = torch.argsort(codebook, stable=True).to(torch.uint8)
    ascending = codebook[order.long()]
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    for part in chunks(flat.numel(), block_size, flat.device):
        blocks = slice(part.start // block_size, part.stop // block_size)
        reciprocal = (1.0 / absmax[blocks].clamp(min=TINY)).unsqueeze(1)
        codes[part] = _nearest((flat[part].float().view(-1, block_size) * reciprocal).flatten(), midpoints, order)
    whole = flat.numel() // block_size * block_size
    if whole < flat.numel():
        codes[whole:] = _nearest(flat[whole:].float() / absmax[-1].clamp(min=TINY), midpoints, order)
    return pack_nibbles(codes, spare=int(_nearest(torch.zeros(1), midpoints.cpu(), order.cpu()))), absmax


def _nearest(scaled: Tensor, midpoints: Tensor, order: Tensor) -> Tensor:
    return order[torch.bucketize(scaled.clamp_(-1, 1), midpoints, out_int32=True)]


def _native(flat: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    codes, absmax = empty_codes(flat, codebook, block_size)
    _quantize(
        flat.contiguous(), codebook.contiguous(), codes, absmax,
        flat.numel(), block_size, native.DTYPES[flat.dtype], native.threads(),
    )  # fmt: skip
    return codes, absmax


def empty_codes(flat: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - one signature
    """Room for codes, two a byte, and for one number a block."""
    codes = flat.new_empty(block_count(flat.numel(), 2), dtype=torch.uint8)
    return codes, flat.new_empty(block_count(flat.numel(), block_size), dtype=torch.float32)


def takes_codebook(flat: Tensor, codebook: Tensor, block_size: int) -> bool:
    """Whether the native kernels serve."""
    return flat.dtype in native.DTYPES and codebook.dtype == torch.float32 and block_size % 16 == 0


define(
    "quantize_codebook(Tensor flat, Tensor codebook, int block_size) -> (Tensor, Tensor)",
    reference=_reference,
    native_cpu=_native,
    fake=empty_codes,
    accepts=takes_codebook,
)
