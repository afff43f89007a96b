"""4-bit codes back to numbers: codebook[code] · scale of the block, multiplied in float32 and rounded once.

Into a fresh tensor, or into a caller's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.blocks import chunks
from entrenar.ops.codebook.nibbles import unpack_nibbles
from entrenar.ops.gpu_kernels import GpuKernel, numbers
from entrenar.ops.registration import call, define
from entrenar.ops.scales import decode_scales, scale_buffers

_dequantize = native.Function("dequantize_codebook")


def dequantize_codebook(
    packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    """codebook[code] · scale, multiplied in float32 (float64 for a float64 result) and rounded once to `dtype`.

    Args:
        packed: (ceil(count/2),) uint8; scales: as ops/scales.py holds them; codebook: (16,) float32.
    Returns:
        (count,) `dtype`.
    """
    return call("dequantize_codebook", packed, scales, codebook, block_size, count, dtype)


def dequantize_codebook_into(
    packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, out: Tensor
) -> None:
    """`dequantize_codebook` into the caller's contiguous tensor, whose size and dtype say what is wanted."""
    if not out.is_contiguous():
        raise InputError(f"the result tensor has strides {out.stride()}: give a contiguous one")
    torch.ops.entrenar.dequantize_codebook_into(packed, scales, codebook, block_size, out)


def _reference_into(packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, out: Tensor) -> None:
    flat, count, block_scales = out.view(-1), out.numel(), decode_scales(scales)
    if out.dtype == torch.float64:
        block_scales = block_scales.double()
    pairs = _byte_pairs(codebook)
    for part in chunks(count, block_size, packed.device):
        values = pairs.index_select(0, packed[part.start // 2 : part.stop // 2].int()).view(torch.float32)
        blocks = slice(part.start // block_size, part.stop // block_size)
        flat[part].view(-1, block_size).copy_(values.view(-1, block_size) * block_scales[blocks].unsqueeze(1))
    whole = count // block_size * block_size
    if whole < count:
        codes = unpack_nibbles(packed[whole // 2 :], count - whole)
        flat[whole:] = codebook[codes.long()] * block_scales[-1:]  # 1-D: a 0-D float64 would not widen the product


def _byte_pairs(codebook: Tensor) -> Tensor:
    """For each byte the two float32 values of its nibbles, as one int64, so that one gather yields two elements."""
    pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1)
    return pairs.contiguous().view(torch.int64).flatten()


def _native_into(packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, out: Tensor) -> None:
    _dequantize(
        packed.contiguous(), *scale_buffers(scales), codebook.contiguous(), out,
        out.numel(), block_size, native.DTYPES[out.dtype], native.threads(),
    )  # fmt: skip


def _gpu_into(packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, out: Tensor) -> None:
    from entrenar.ops.codebook.dequantize_triton import dequantize_on_gpu

    dequantize_on_gpu(packed, scales, codebook, block_size, out)


def _samples(device: torch.device) -> list[tuple[Tensor, list[Tensor], Tensor, int]]:
    """Scales as they are held in each way: see ops/scales.py."""
    packed, values, group = (numbers(device, 500) * 50 + 100).byte(), numbers(device, 16), numbers(device, 1)
    codes, table = (numbers(device, 16) * 50 + 100).byte(), numbers(device, 256)
    return [(packed, scales, values, 64) for scales in ([values], [codes, group], [codes, group, group, table])]


def _accepts_into(_packed: Tensor, _scales: list[Tensor], codebook: Tensor, block_size: int, out: Tensor) -> bool:
    return _accepts(_packed, _scales, codebook, block_size, 0, out.dtype)


def _accepts(
    _packed: Tensor, _scales: list[Tensor], codebook: Tensor, block_size: int, _count: int, dtype: torch.dtype
) -> bool:
    return dtype in native.DTYPES and codebook.dtype == torch.float32 and block_size % 2 == 0


def _fake(
    packed: Tensor, _scales: list[Tensor], _codebook: Tensor, _block_size: int, count: int, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(count, dtype=dtype)


def _fresh(into: Callable[..., None]) -> Callable[..., Tensor]:
    """The same into a new tensor."""

    def fresh(
        packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, count: int, dtype: torch.dtype
    ) -> Tensor:
        out = packed.new_empty(count, dtype=dtype)
        into(packed, scales, codebook, block_size, out)
        return out

    return fresh


_ARGUMENTS = "Tensor packed, Tensor[] scales, Tensor codebook, int block_size"
define(
    f"dequantize_codebook({_ARGUMENTS}, SymInt count, ScalarType dtype) -> Tensor",
    reference=_fresh(_reference_into),
    native_cpu=_fresh(_native_into),
    gpu=GpuKernel(_fresh(_gpu_into), lambda device: [(*weight, 1000, torch.float32) for weight in _samples(device)]),
    fake=_fake,
    accepts=_accepts,
)
define(
    f"dequantize_codebook_into({_ARGUMENTS}, Tensor(a!) out) -> ()",
    reference=_reference_into,
    native_cpu=_native_into,
    gpu=GpuKernel(_gpu_into, lambda device: [(*weight, numbers(device, 1000)) for weight in _samples(device)]),
    fake=lambda *_args: None,
    accepts=_accepts_into,
)
