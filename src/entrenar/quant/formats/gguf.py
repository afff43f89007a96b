"""GGUF's types, quantized and float: rows held byte for byte as they stand in the file (ops/gguf/blocks.py)."""

import torch
from torch import Tensor

from entrenar.ops.linear.gguf import GGUF_TYPES, block_of, decode_rows
from entrenar.ops.linear.weight import GGUFWeight, LinearWeight
from entrenar.quant.format import KeptFormat
from entrenar.quant.scales import Parts


def _kept_format(type: str) -> KeptFormat:
    def dequantize(parts: Parts, _block_size: int, _count: int, dtype: torch.dtype) -> Tensor:
        return decode_rows(parts["codes"], type, dtype).flatten()

    def linear_weight(parts: Parts, _block_size: int, _shape: tuple[int, int]) -> LinearWeight:
        return GGUFWeight(parts["codes"], type)

    return KeptFormat(name=type, dequantize=dequantize, linear_weight=linear_weight)


FORMATS = tuple(_kept_format(type) for type in GGUF_TYPES)
BLOCK_SIZES = {type: block_of(type)[0] for type in GGUF_TYPES}
