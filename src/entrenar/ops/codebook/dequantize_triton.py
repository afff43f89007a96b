"""4-bit codes back to numbers on a GPU: what the reference does in ten launches as one Triton kernel, to the bit."""

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from entrenar.ops.gpu_kernels import where_it_is
from entrenar.ops.scales import GROUP

_BYTES = 1024  # of packed codes, for one program


@triton.jit
def _kernel(
    packed, out, codebook, scales, group, offset, table, count,  # noqa: ANN001
    parts: tl.constexpr, block_size: tl.constexpr, group_size: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    # Triton reads annotations, and knows of no other type than its own.
    start = tl.program_id(0).to(tl.int64) * size
    place = start + tl.arange(0, size)
    inside = place * 2 < count
    byte = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    block = place * 2 // block_size
    scale = tl.load(scales + block, mask=inside, other=0)
    # As _decode_reference in ops/scales.py, every step rounded for itself: the launch forbids fused multiply-adds.
    if parts == 2:
        scale = tl.math.div_rn(scale.to(tl.float32), 255.0) * tl.load(
            group + block // group_size, mask=inside, other=0.0
        )
    if parts == 4:
        spread = tl.load(group + block // group_size, mask=inside, other=0.0)
        scale = tl.load(table + scale.to(tl.int32)) * spread + tl.load(offset)
    even = tl.load(codebook + (byte >> 4)) * scale
    odd = tl.load(codebook + (byte & 15)) * scale
    element = start * 2 + tl.arange(0, 2 * size)
    tl.store(out + element, tl.interleave(even, odd).to(out.dtype.element_ty), mask=element < count)


def dequantize_on_gpu(packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, out: Tensor) -> None:
    """Fill a contiguous `out` (float32, float16, bfloat16); otherwise as `dequantize_codebook_into`, on one GPU.

    Raises:
        RuntimeError and what else Triton raises: it cannot compile, e.g. for want of a C compiler.
    """
    count = out.numel()
    if not count:
        return
    parts = [part.contiguous() for part in scales]
    group, offset, table = [*parts[1:], *[codebook] * 3][:3]  # those that are not there are never looked at
    kernel: Any = _kernel
    with where_it_is(packed):
        kernel[(triton.cdiv((count + 1) // 2, _BYTES),)](
            packed.contiguous(), out, codebook.contiguous(), parts[0], group, offset, table, count,
            parts=len(parts), block_size=block_size, group_size=GROUP, size=_BYTES, enable_fp_fusion=False,
        )  # fmt: skip
