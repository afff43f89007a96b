"""int8: scale = absmax / 127 per block or per row. |error| ≤ scale / 2 (+ 127 · the scale's error when nested)."""

import torch
from torch import Tensor

from entrenar.ops.blocks import block_absmax
from entrenar.ops.symmetric import dequantize_symmetric, quantize_symmetric
from entrenar.quant.format import Format
from entrenar.quant.scales import Parts, block_scales, nest_linear, plain


def _quantize(flat: Tensor, block_size: int, double_quant: bool) -> Parts:
    scales = block_absmax(flat, block_size) / 127
    codes = quantize_symmetric(flat, scales, 127, block_size).view(torch.uint8)
    return {"codes": codes} | (nest_linear(scales) if double_quant else plain(scales))


def _dequantize(parts: Parts, block_size: int, count: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001 - one signature
    return dequantize_symmetric(parts["codes"].view(torch.int8), block_scales(parts), block_size, dtype)


FORMAT = Format(name="int8", bits=8, quantize=_quantize, dequantize=_dequantize)
