"""What the 4-bit formats share: two codes a byte, read through a codebook; and bitsandbytes' way to write them."""

from collections.abc import Callable

import torch
from torch import Tensor

from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.codebook.quantize import quantize_codebook
from entrenar.ops.codebook.search import search_codebook
from entrenar.ops.linear.weight import CodebookWeight, LinearWeight
from entrenar.quant.codebooks import codebook
from entrenar.quant.format import Format
from entrenar.quant.scales import Parts, hold_dynamic, scale_tensors


def four_bit_format(
    name: str,
    encode: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    hold: Callable[[Tensor, bool], Parts],
    search: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> Format:
    """The registry row of a format of 4-bit codes into the codebook `name`."""

    def dequantize(parts: Parts, block_size: int, count: int, dtype: torch.dtype) -> Tensor:
        table = codebook(name, parts["codes"].device)
        return dequantize_codebook(parts["codes"], scale_tensors(parts), table, block_size, count, dtype)

    def linear_weight(parts: Parts, block_size: int, shape: tuple[int, int]) -> LinearWeight:
        table = codebook(name, parts["codes"].device)
        return CodebookWeight(parts["codes"], scale_tensors(parts), table, block_size, shape)

    return Format(
        name=name, bits=4, encode=encode, hold=hold, dequantize=dequantize, linear_weight=linear_weight, search=search
    )


def codebook_format(name: str) -> Format:
    """The registry row of a bitsandbytes 4-bit format."""

    def encode(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        return quantize_codebook(flat, codebook(name, flat.device), block_size)

    def search(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        return search_codebook(flat, codebook(name, flat.device), block_size)

    return four_bit_format(name, encode, hold_dynamic, search)
