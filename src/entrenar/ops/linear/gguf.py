"""A weight that stays as a GGUF file holds it: its blocks, or 16- and 32-bit floats, decoded row by row."""

import gguf
import torch
from torch import Tensor

from entrenar.ops.gguf.blocks import DEQUANTIZED_TYPES, dequantize_gguf
from entrenar.ops.linear.panels import RowPanels, scratch_for

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


def gguf_panels(packed: Tensor, type: str) -> RowPanels:
    """The weight as torch's matmul takes it where the native product does not serve."""
    columns = columns_of(packed, type)

    def decode(rows: slice, dtype: torch.dtype) -> Tensor:
        part = packed[rows]
        out = scratch_for(len(part) * columns, dtype).view(len(part), columns) if packed.device.type == "cpu" else None
        return decode_rows(part, type, dtype, out)

    return RowPanels((len(packed), columns), decode)
