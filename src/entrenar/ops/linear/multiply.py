"""Sums of bfloat16 products whose right-hand sides are weights decoded while they are multiplied (csrc/matmul).

C = alpha · Σ A·op(B) + bias, float32 sums. On every path of the native library: where the CPU has no bfloat16 products
float vectors serve, which are faster than PyTorch's emulation even on the generic path (docs/kernels.md has figures).
Letters: M rows of A and C, N columns of C, K the inner dimension of a term.
"""

import ctypes
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from entrenar import native
from entrenar.native import abi
from entrenar.native.abi import ScaleBuffers, SourceView, TermView
from entrenar.ops.scales import scale_buffers

_DENSE, _CODEBOOK4, _GGUF, _INT8 = abi.constants(
    "SourceKind::dense", "SourceKind::codebook4", "SourceKind::gguf", "SourceKind::int8"
)


@dataclass(frozen=True)
class WeightView:
    """A weight to multiply by: its C view, and the tensors that view points into.

    `lasting`: who owns the weight keeps this view from call to call. A matrix' view is made for every call: it may
    point into a converted copy, which nobody should hold on to.
    """

    view: SourceView
    tensors: tuple[Tensor | None, ...]
    lasting: bool = True


def dense_weight(matrix: Tensor, scale: float = 1.0) -> WeightView:
    """A float32 or bfloat16 matrix with contiguous rows, times `scale`, rounded to bfloat16."""
    (rows, columns), (stride, step) = matrix.shape, matrix.stride()
    assert step == 1 or columns <= 1
    reach = ((rows - 1) * stride + columns) * matrix.itemsize if rows else 0
    dtype = native.DTYPES[matrix.dtype]
    return WeightView(
        SourceView(_DENSE, dtype, rows, columns, stride, scale, 0, 0, matrix.data_ptr(), reach),
        (matrix,),
        lasting=False,
    )


def codebook_weight(
    packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, shape: tuple[int, int]
) -> WeightView:
    """A 4-bit weight as ops/codebook/dequantize.py takes it."""
    return _quantized(_CODEBOOK4, packed, scales, codebook, block_size, shape)


def int8_weight(codes: Tensor, scales: list[Tensor], block_size: int, shape: tuple[int, int]) -> WeightView:
    """A weight of one byte an element as ops/symmetric/dequantize.py takes it."""
    return _quantized(_INT8, codes, scales, None, block_size, shape)


def _quantized(
    kind: int, codes: Tensor, scales: list[Tensor], codebook: Tensor | None, block_size: int, shape: tuple[int, int]
) -> WeightView:
    alive = (codes.contiguous(), *scale_buffers(scales), None if codebook is None else codebook.contiguous())
    parts, of_scales, of_codebook = (
        [value for tensor in tensors for value in native.buffer(tensor)]
        for tensors in (alive[:1], alive[1:-1], alive[-1:])
    )
    view = SourceView(kind, 0, *shape, shape[1], 1.0, 0, block_size, *parts, ScaleBuffers(*of_scales), *of_codebook)
    return WeightView(view, alive)


def gguf_weight(packed: Tensor, type: str, shape: tuple[int, int]) -> WeightView:
    """Blocks of a GGUF type, as ops/gguf/blocks.py takes them."""
    blocks = packed.contiguous()
    kind = gguf.GGMLQuantizationType[type.upper()]
    return WeightView(SourceView(_GGUF, kind, *shape, shape[1], 1.0, 0, 0, *native.buffer(blocks)), (blocks,))


@dataclass(frozen=True)
class Term:
    """A (M, K) bfloat16 with contiguous rows, times B (K, N), or times Bᵀ of B (N, K) when `transposed`.

    A weight that is smaller than K and N ask for counts as followed by zeros.
    """

    a: Tensor
    weight: WeightView
    transposed: bool


_multiply = native.Function("multiply")


def multiply(terms: list[Term], out: Tensor, alpha: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """out (M, N), contiguous float32 or bfloat16, = alpha · Σ A·op(B) + bias (N,) bfloat16; returned."""
    array = (TermView * len(terms))()
    for view, term in zip(array, terms, strict=True):
        rows, inner = term.a.shape
        stride = term.a.stride(0) if rows > 1 else inner
        view.a, view.a_stride, view.inner = term.a.data_ptr(), stride, inner
        view.a_bytes = ((rows - 1) * stride + inner) * 2 if rows and inner else 0
        view.transposed, view.source = term.transposed, term.weight.view
    _multiply(
        ctypes.addressof(array), len(terms), bias, out, *out.shape, alpha, native.DTYPES[out.dtype], native.threads()
    )
    return out


def product_into(out: Tensor, a: Tensor, b: Tensor, *, transposed: bool) -> None:
    """out (M, N) = a (M, K) · b (K, N), or a · bᵀ of b (N, K) when `transposed`; contiguous matrices of one dtype.

    bfloat16 natively: PyTorch arranges b anew at every call, or emulates.
    """
    matrices = (out, a, b)
    if native.available() and all(
        m.dtype == torch.bfloat16 and m.is_contiguous() and native.is_eager(m) for m in matrices
    ):
        multiply([Term(a, dense_weight(b), transposed)], out)
    else:
        torch.mm(a, b.t() if transposed else b, out=out)
