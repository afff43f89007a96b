"""Products with a weight that stays as a GGUF file holds it: its blocks, or 16- and 32-bit floats.

A panel of rows is decoded into a scratch that stays in cache, and torch's matmul takes it from there; the weight never
exists whole. (Where the CPU multiplies bfloat16 natively, ops/multiply.py decodes the blocks inside the product.)
Letters: B tokens, O out_features, I in_features.
"""

from collections.abc import Iterator

import gguf
import torch
from torch import Tensor

from entrenar.ops.gguf_blocks import DEQUANTIZED_TYPES, dequantize_gguf
from entrenar.ops.linear_codebook import panel_step, scratch_for

FLOAT_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
GGUF_TYPES = (*FLOAT_TYPES, *DEQUANTIZED_TYPES)


def block_of(type: str) -> tuple[int, int]:
    """Elements and bytes of a block of a type."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type.upper()]]


def columns_of(packed: Tensor, type: str) -> int:
    """Elements in a row of packed (rows, bytes of a row)."""
    elements, size = block_of(type)
    return packed.shape[-1] // size * elements


def decode_rows(packed: Tensor, type: str, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Rows as a GGUF holds them → their values.

    Args:
        packed: (rows, bytes of a row) uint8; type: one of GGUF_TYPES.
        out: a contiguous (rows, columns) tensor of `dtype` to write into, or None for a fresh one.
    Returns:
        (rows, columns) `dtype`, rounded once.
    """
    if type not in FLOAT_TYPES:
        return dequantize_gguf(packed, type, columns_of(packed, type), dtype, out)
    values = packed.contiguous().view(FLOAT_TYPES[type])
    return values.to(dtype, copy=True) if out is None else out.copy_(values)


def gguf_product(x: Tensor, packed: Tensor, type: str, bias: Tensor | None = None) -> Tensor:
    """X (B, I), bias (O,) of x's dtype → x·Wᵀ + bias (B, O). No gradient is recorded."""
    with torch.no_grad():
        y = x.new_empty(len(x), len(packed))
        for rows, weight in _panels(packed, type, x.dtype):
            if bias is None:
                torch.mm(x, weight.t(), out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, weight.t(), out=y[:, rows])
        return y


def gguf_transposed_product(grad: Tensor, packed: Tensor, type: str) -> Tensor:
    """Grad (B, O) → grad·W (B, I); panels are summed in float32 at least."""
    with torch.no_grad():
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(len(grad), columns_of(packed, type), dtype=dtype)
        for rows, weight in _panels(packed, type, grad.dtype):
            if dtype == grad.dtype:
                total.addmm_(grad[:, rows], weight)
            else:
                total += grad[:, rows] @ weight
        return total.to(grad.dtype)


def _panels(packed: Tensor, type: str, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Panels of rows of the weight, each valid until the next one."""
    columns = columns_of(packed, type)
    if packed.device.type != "cpu":  # whose matmul wants the whole weight
        yield slice(0, len(packed)), decode_rows(packed, type, dtype)
        return
    step = panel_step(len(packed), columns * dtype.itemsize)
    for start in range(0, len(packed), step):
        part = packed[start : start + step]
        out = scratch_for(len(part) * columns, dtype).view(len(part), columns)
        yield slice(start, start + len(part)), decode_rows(part, type, dtype, out)
