"""int4: scale = absmax / 7, two's-complement nibbles. |error| ≤ scale / 2 (+ 7 · the scale's error when nested)."""

from torch import Tensor

from entrenar.ops.symmetric.quantize import quantize_symmetric
from entrenar.quant.formats.codebook4 import four_bit_format
from entrenar.quant.scales import hold_linear


def _encode(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return quantize_symmetric(flat, 7, block_size)


FORMAT = four_bit_format("int4", _encode, hold_linear)
