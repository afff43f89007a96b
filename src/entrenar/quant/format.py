"""What a number format is: one row of the registry, for weights that are made here or that are kept as they came."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.ops.linear.weight import LinearWeight
from entrenar.quant.scales import Parts


@dataclass(frozen=True, kw_only=True)
class Format:
    """A block format over flat weights.

    encode(flat (n,) float, block_size) → codes uint8 and the scale of every block, float32; blocks do not depend on
    each other, so that encoding whole blocks piece by piece gives the same;
    search: the same, but each block's scale is chosen for the least squared error; None where there is no such search;
    hold(scales, double_quant) → the parts beside the codes, each a uint8 tensor;
    dequantize(parts, block_size, n, dtype) → (n,) dtype;
    linear_weight(parts, block_size, (d_out, d_in)) → what a linear layer multiplies by.
    """

    name: str
    bits: int
    encode: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    hold: Callable[[Tensor, bool], Parts]
    dequantize: Callable[[Parts, int, int, torch.dtype], Tensor]
    linear_weight: Callable[[Parts, int, tuple[int, int]], LinearWeight]
    search: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None

    def encoder(self, search: bool) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
        """`search` or `encode`; InputError where there is no search."""
        if search and self.search is None:
            raise InputError(f"{self.name} has no search for better scales: nf4 and fp4 have one")
        return self.search if search and self.search else self.encode

    def quantize(self, flat: Tensor, block_size: int, double_quant: bool, search: bool = False) -> Parts:
        """Flat (n,) float → all parts."""
        codes, scales = self.encoder(search)(flat, block_size)
        return {"codes": codes} | self.hold(scales, double_quant)


@dataclass(frozen=True, kw_only=True)
class KeptFormat:
    """A format that weights come in and are kept in: a type of GGUF. Nothing is quantized to it when a model is loaded.

    dequantize and linear_weight are as in `Format`; the one part is `codes`, the rows' bytes (rows, bytes of a row).
    """

    name: str
    dequantize: Callable[[Parts, int, int, torch.dtype], Tensor]
    linear_weight: Callable[[Parts, int, tuple[int, int]], LinearWeight]
