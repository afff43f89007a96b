"""What a frozen linear layer multiplies by: one small interface over every way a weight is held.

`product` and `transposed_product` run on any device and dtype; `source` is what the native product decodes
(ops/linear/multiply.py). Letters: B tokens, O out_features, I in_features.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from entrenar import native
from entrenar.native.cached import Cached
from entrenar.ops.blocks import block_count
from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.linear.codebook import accepts, codebook_product, codebook_transposed_product, linear_codebook
from entrenar.ops.linear.gguf import FLOAT_TYPES, columns_of, decode_rows, gguf_panels
from entrenar.ops.linear.multiply import (
    Term,
    WeightView,
    codebook_weight,
    dense_weight,
    gguf_weight,
    int8_weight,
    multiply,
)
from entrenar.ops.linear.panels import RowPanels
from entrenar.ops.registration import compute
from entrenar.ops.scales import decode_scales
from entrenar.ops.symmetric.dequantize import dequantize_int8


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

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """W (O, I) in a dtype."""
        ...

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """X (..., I) → x·Wᵀ + bias (..., O) out of operations that autograd, torch.compile and tracers know."""
        ...

    def source(self) -> WeightView:
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
        return F.linear(x, self.decoded(x.dtype), bias)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad·W."""
        return grad @ self.decoded(grad.dtype)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The matrix itself, converted if need be."""
        return self.matrix.to(dtype)

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `product`, for tracers."""
        return self.product(x, bias)

    def source(self) -> WeightView:
        """The matrix itself; a float16 one as float32."""
        matrix = self.matrix.detach()
        usable = matrix.dtype in (torch.float32, torch.bfloat16) and matrix.stride(1) == 1
        return dense_weight(matrix if usable else matrix.float().contiguous())


@dataclass(frozen=True)
class CodebookWeight:
    """A 4-bit weight; the fields are as in ops/linear/codebook.py."""

    packed: Tensor
    scales: list[Tensor]
    codebook: Tensor
    block_size: int
    shape: tuple[int, int]
    _view: Cached[WeightView] = field(default_factory=Cached, init=False, repr=False, compare=False)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X·Wᵀ + bias."""
        if self._is_native(x, bias):
            return codebook_product(x, self.source(), bias)
        parts = (self.packed, self.scales, self.codebook, self.block_size)
        return compute("linear_codebook", x, *parts, self.shape[0], bias)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad·W."""
        if self._is_native(grad):
            return codebook_transposed_product(grad, self.source())
        parts = (self.packed, self.scales, self.codebook, self.block_size)
        return compute("linear_codebook_backward", grad, *parts, self.shape[1])

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Every block decoded."""
        count = self.shape[0] * self.shape[1]
        parts = (self.packed, self.scales, self.codebook, self.block_size)
        return dequantize_codebook(*parts, count, dtype).view(self.shape)

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `product`, for tracers."""
        parts = (self.packed, self.scales, self.codebook, self.block_size)
        return linear_codebook(x, *parts, self.shape[0], bias)

    def source(self) -> WeightView:
        """The packed weight."""
        tensors = (self.packed, *self.scales, self.codebook)
        return self._view.get(
            [tensor.data_ptr() for tensor in tensors],
            lambda: codebook_weight(self.packed, self.scales, self.codebook, self.block_size, self.shape),
        )

    def _is_native(self, x: Tensor, bias: Tensor | None = None) -> bool:
        """Whether the kernels may be called with the kept view, past what prepares any call."""
        return native.is_eager(x) and native.available() and accepts(x, self.codebook, self.block_size, bias)


@dataclass(frozen=True)
class Int8Weight:
    """One byte an element; the fields are as in ops/symmetric/dequantize.py."""

    codes: Tensor
    scales: list[Tensor]
    block_size: int
    shape: tuple[int, int]
    _view: Cached[WeightView] = field(default_factory=Cached, init=False, repr=False, compare=False)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X·Wᵀ + bias."""
        return _native_product(self, x, bias) if _multiplies(x) else self._panels().product(x, bias)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad·W."""
        return _native_transposed(self, grad) if _multiplies(grad) else self._panels().transposed_product(grad)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Every block decoded."""
        return dequantize_int8(self.codes, self.scales, self.block_size, dtype).view(self.shape)

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `product`, for tracers."""
        return F.linear(x, self.decoded(x.dtype), bias)

    def source(self) -> WeightView:
        """The codes themselves."""
        return self._view.get(
            [tensor.data_ptr() for tensor in (self.codes, *self.scales)],
            lambda: int8_weight(self.codes, self.scales, self.block_size, self.shape),
        )

    def _panels(self) -> RowPanels:
        columns, scales = self.shape[1], decode_scales(self.scales)

        def decode(rows: slice, dtype: torch.dtype) -> Tensor:
            begin, end = rows.start * columns, rows.stop * columns
            blocks = slice(begin // self.block_size, block_count(end, self.block_size))
            part = dequantize_int8(self.codes[begin:end], [scales[blocks]], self.block_size, dtype)
            return part.view(-1, columns)

        # A panel starts a block.
        return RowPanels(self.shape, decode, self.block_size // math.gcd(self.block_size, max(columns, 1)))


@dataclass(frozen=True)
class GGUFWeight:
    """Rows as a GGUF holds them: packed (O, bytes of a row) uint8 of a type of ops/linear/gguf.py."""

    packed: Tensor
    type: str
    _view: Cached[WeightView] = field(default_factory=Cached, init=False, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.packed.shape[0], columns_of(self.packed, self.type)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X·Wᵀ + bias."""
        if _multiplies(x):
            return _native_product(self, x, bias)
        return gguf_panels(self.packed, self.type).product(x, bias)

    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad·W."""
        if _multiplies(grad):
            return _native_transposed(self, grad)
        return gguf_panels(self.packed, self.type).transposed_product(grad)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Every row decoded."""
        return decode_rows(self.packed, self.type, dtype)

    def traced(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The same as `product`, for tracers."""
        return F.linear(x, self.decoded(x.dtype), bias)

    def source(self) -> WeightView:
        """The blocks themselves; 16- and 32-bit floats as a matrix."""
        if self.type in FLOAT_TYPES:
            return DenseWeight(self.packed.view(FLOAT_TYPES[self.type])).source()
        return self._view.get(self.packed.data_ptr(), lambda: gguf_weight(self.packed, self.type, self.shape))


def _native_product(weight: LinearWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    return multiply([Term(x, weight.source(), transposed=True)], x.new_empty(len(x), weight.shape[0]), bias=bias)


def _native_transposed(weight: LinearWeight, grad: Tensor) -> Tensor:
    return multiply([Term(grad, weight.source(), transposed=False)], grad.new_empty(len(grad), weight.shape[1]))


def _multiplies(x: Tensor) -> bool:
    """Whether the native product takes x (B, I)."""
    return x.dtype == torch.bfloat16 and x.stride(-1) == 1 and native.is_eager(x) and native.available()
