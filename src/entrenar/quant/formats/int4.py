"""int4: scale = absmax / 7, two's-complement nibbles. |error| ≤ scale / 2 (+ 7 · the scale's error when nested)."""

from torch import Tensor

from entrenar.ops.quantize_symmetric import quantize_symmetric
from entrenar.quant.formats.codebook4 import four_bit_format
from entrenar.quant.scales import Parts, nest_linear, plain


def _quantize(flat: Tensor, block_size: int, double_quant: bool) -> Parts:
    codes, scales = quantize_symmetric(flat, 7, block_size)
    return {"codes": codes} | (nest_linear(scales) if double_quant else plain(scales))


FORMAT = four_bit_format("int4", _quantize)
