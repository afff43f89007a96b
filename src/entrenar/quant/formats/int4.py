"""int4: scale = absmax / 7, two's-complement nibbles. |error| ≤ scale / 2 (+ 7 · the scale's error when nested)."""

import torch
from torch import Tensor

from entrenar.ops.blocks import block_absmax
from entrenar.ops.codebook import dequantize_codebook
from entrenar.ops.nibbles import pack_nibbles
from entrenar.ops.symmetric import quantize_symmetric
from entrenar.quant.codebooks import codebook
from entrenar.quant.format import Format
from entrenar.quant.scales import Parts, block_scales, nest_linear, plain


def _quantize(flat: Tensor, block_size: int, double_quant: bool) -> Parts:
    scales = block_absmax(flat, block_size) / 7
    codes = pack_nibbles(quantize_symmetric(flat, scales, 7, block_size).view(torch.uint8) & 15)
    return {"codes": codes} | (nest_linear(scales) if double_quant else plain(scales))


def _dequantize(parts: Parts, block_size: int, count: int, dtype: torch.dtype) -> Tensor:
    table = codebook("int4", parts["codes"].device)
    return dequantize_codebook(parts["codes"], block_scales(parts), table, block_size, count, dtype)


FORMAT = Format(name="int4", bits=4, quantize=_quantize, dequantize=_dequantize)
