"""int8: scale = absmax / 127 per block or per row. |error| ≤ scale / 2 (+ 127 · the scale's error when nested)."""

import torch
from torch import Tensor

from entrenar.ops.linear.weight import Int8Weight, LinearWeight
from entrenar.ops.symmetric.dequantize import dequantize_int8
from entrenar.ops.symmetric.quantize import quantize_symmetric
from entrenar.quant.format import Format
from entrenar.quant.scales import Parts, hold_linear, scale_tensors


def _encode(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return quantize_symmetric(flat, 127, block_size)


def _dequantize(parts: Parts, block_size: int, count: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001 - one signature
    return dequantize_int8(parts["codes"], scale_tensors(parts), block_size, dtype)


def _linear_weight(parts: Parts, block_size: int, shape: tuple[int, int]) -> LinearWeight:
    return Int8Weight(parts["codes"], scale_tensors(parts), block_size, shape)


FORMAT = Format(
    name="int8", bits=8, encode=_encode, hold=hold_linear, dequantize=_dequantize, linear_weight=_linear_weight
)
