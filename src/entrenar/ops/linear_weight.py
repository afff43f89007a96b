"""What a frozen linear layer multiplies by: one small interface over every way a weight is held.

`product` and `transposed_product` run on any device and dtype; `source` is what the native product decodes
(ops/multiply.py). Letters: B tokens, O out_features, I in_features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from entrenar.ops import native
from entrenar.ops.library import compute
from entrenar.ops.linear_codebook import linear_codebook
from entrenar.ops.linear_gguf import FLOAT_TYPES, columns_of, decode_rows, gguf_product, gguf_transposed_product
from entrenar.ops.multiply import (
    Term,
    Weight,
    codebook_weight,
    dense_weight,
    gguf_weight,
    multiply,
)


class LinearWeight(Protocol):
    """W (O, I), frozen."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        ...

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X (B, I) → x·Wᵀ + bias (B, O), a fresh tensor; bias (O,) of x's dtype. No gradient is recorded."""
        ...

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad (B, O) → grad·W (B, I), a fresh tensor."""
        ...

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """X (..., I) → x·Wᵀ + bias (..., O) out of operations that autograd, torch.compile and tracers know."""
        ...

    def source(self) -> Weight:
        """The weight as the native product reads it."""
        ...


@dataclass(frozen=True)
class DenseWeight:
    """A float matrix as it is; used in the dtype of the tokens."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X·Wᵀ + bias."""
        return F.linear(x, self.matrix.to(x.dtype), bias)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad·W."""
        return grad @ self.matrix.to(grad.dtype)

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `product`, for tracers."""
        return F.linear(x, self.matrix.to(x.dtype), bias)

    def source(self) -> Weight:
        """The matrix itself; a float16 one as float32."""
        matrix = self.matrix.detach()
        usable = matrix.dtype in (torch.float32, torch.bfloat16) and matrix.stride(1) == 1
        return dense_weight(matrix if usable else matrix.float().contiguous())


@dataclass(frozen=True)
class DecodedWeight:
    """A weight that is decoded whole, each time it is used, by `decode(dtype)` → (O, I)."""

    decode: Callable[[torch.dtype], Tensor]
    shape: tuple[int, int]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X·Wᵀ + bias."""
        return F.linear(x, self.decode(x.dtype), bias)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad·W."""
        return grad @ self.decode(grad.dtype)

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `product`, for tracers."""
        return F.linear(x, self.decode(x.dtype), bias)

    def source(self) -> Weight:
        """The decoded matrix in bfloat16."""
        return dense_weight(self.decode(torch.bfloat16))


@dataclass(frozen=True)
class CodebookWeight:
    """A 4-bit weight; the fields are as in ops/linear_codebook.py."""

    packed: Tensor
    scales: list[Tensor]
    codebook: Tensor
    block_size: int
    shape: tuple[int, int]

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X·Wᵀ + bias."""
        held = (self.packed, self.scales, self.codebook, self.block_size)
        return compute("linear_codebook", x, *held, self.shape[0], bias)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad·W."""
        held = (self.packed, self.scales, self.codebook, self.block_size)
        return compute("linear_codebook_backward", grad, *held, self.shape[1])

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `product`, for tracers."""
        held = (self.packed, self.scales, self.codebook, self.block_size)
        return linear_codebook(x, *held, self.shape[0], bias)

    def source(self) -> Weight:
        """The packed weight; the view is made once, and again if the tensors have moved."""
        made = self.__dict__.get("_source")
        if made is None or not made.is_current():
            made = codebook_weight(self.packed, self.scales, self.codebook, self.block_size, self.shape)
            self.__dict__["_source"] = made
        return made


@dataclass(frozen=True)
class GGUFWeight:
    """Rows as a GGUF holds them: packed (O, bytes of a row) uint8 of a type of ops/linear_gguf.py."""

    packed: Tensor
    type: str

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.packed.shape[0], columns_of(self.packed, self.type)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X·Wᵀ + bias."""
        if _multiplies(x):
            out = x.new_empty(len(x), self.shape[0])
            return multiply([Term(x, self.source(), transposed=True)], out, bias=bias)
        return gguf_product(x, self.packed, self.type, bias)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad·W."""
        if _multiplies(grad):
            return multiply([Term(grad, self.source(), transposed=False)], grad.new_empty(len(grad), self.shape[1]))
        return gguf_transposed_product(grad, self.packed, self.type)

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `product`, for tracers."""
        return F.linear(x, decode_rows(self.packed, self.type, x.dtype), bias)

    def source(self) -> Weight:
        """The blocks themselves, the view made once as above; 16- and 32-bit floats as a matrix."""
        if self.type in FLOAT_TYPES:
            return DenseWeight(self.packed.view(FLOAT_TYPES[self.type])).source()
        made = self.__dict__.get("_source")
        if made is None or not made.is_current():
            made = gguf_weight(self.packed, self.type, self.shape)
            self.__dict__["_source"] = made
        return made


def _multiplies(x: Tensor) -> bool:
    """Whether the native product takes x (B, I)."""
    return x.dtype == torch.bfloat16 and x.stride(-1) == 1 and native.is_eager(x) and native.available()
