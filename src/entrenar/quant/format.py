"""What a number format is: one row of the registry."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.ops.linear_weight import LinearWeight
from entrenar.quant.scales import Parts


@dataclass(frozen=True, kw_only=True)
class Format:
    """A block format over flat weights.

    quantize(flat (n,) float, block_size, double_quant) → parts, each a uint8 tensor;
    dequantize(parts, block_size, n, dtype) → (n,) dtype;
    linear_weight(parts, block_size, (d_out, d_in)) → what a linear layer multiplies by without a whole dequantized
    weight; None where the format has no such kernel.
    """

    name: str
    bits: int
    quantize: Callable[[Tensor, int, bool], Parts]
    dequantize: Callable[[Parts, int, int, torch.dtype], Tensor]
    linear_weight: Callable[[Parts, int, tuple[int, int]], LinearWeight] | None = None
