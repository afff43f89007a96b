"""One result of each kind of kernel."""

import torch

from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.codebook.quantize import quantize_codebook
from entrenar.ops.linear.codebook import linear_codebook
from entrenar.ops.symmetric.quantize import quantize_symmetric
from tests.support.samples import DTYPES, gaussian

CODEBOOK = torch.linspace(-1, 1, 16)


def everything(seed: int = 0) -> list[bytes]:
    """A result of each kind of kernel, large enough for several threads."""
    flat = gaussian(256 * 1024 + 77, seed=seed)
    packed, absmax = quantize_codebook(flat, CODEBOOK, 64)
    tensors = [packed, absmax, *quantize_symmetric(flat, 127, 64), *quantize_symmetric(flat, 7, 64)]
    tensors += [dequantize_codebook(packed, [absmax], CODEBOOK, 64, flat.numel(), dtype) for dtype in DTYPES]
    tensors += [linear_codebook(gaussian(3 * 1024).view(3, 1024), packed, [absmax], CODEBOOK, 64, 256)]
    return [tensor.numpy().tobytes() for tensor in tensors if tensor.dtype != torch.bfloat16]
