"""What nf4 and fp4 share: bitsandbytes' absmax, nested scales and byte order around a codebook."""

import torch
from torch import Tensor

from entrenar.ops.blocks import block_absmax
from entrenar.ops.codebook import TINY, dequantize_codebook, quantize_codebook
from entrenar.quant.codebooks import codebook
from entrenar.quant.format import Format
from entrenar.quant.scales import Parts, block_scales, nest_dynamic, plain


def codebook_format(name: str) -> Format:
    """The registry row of a bitsandbytes 4-bit format."""

    def quantize(flat: Tensor, block_size: int, double_quant: bool) -> Parts:
        absmax = block_absmax(flat, block_size)
        if flat.numel() % block_size:
            absmax[-1].clamp_(min=TINY)
        codes = quantize_codebook(flat, absmax, codebook(name, flat.device), block_size)
        return {"codes": codes} | (nest_dynamic(absmax) if double_quant else plain(absmax))

    def dequantize(parts: Parts, block_size: int, count: int, dtype: torch.dtype) -> Tensor:
        table = codebook(name, parts["codes"].device)
        return dequantize_codebook(parts["codes"], block_scales(parts), table, block_size, count, dtype)

    return Format(name=name, bits=4, quantize=quantize, dequantize=dequantize)
