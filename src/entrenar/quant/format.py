"""What a number format is: one row of the registry."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.quant.scales import Parts


@dataclass(frozen=True, kw_only=True)
class Format:
    """A block format over flat weights.

    quantize(flat (n,) float, block_size, double_quant) → parts, each a uint8 tensor;
    dequantize(parts, block_size, n, dtype) → (n,) dtype;
    linear(x (..., d_in), parts, block_size, d_out, bias) → (..., d_out), differentiable, without a whole dequantized
    weight; None where the format has no such kernel.
    """

    name: str
    bits: int
    quantize: Callable[[Tensor, int, bool], Parts]
    dequantize: Callable[[Parts, int, int, torch.dtype], Tensor]
    linear: Callable[[Tensor, Parts, int, int, Tensor | None], Tensor] | None = None
