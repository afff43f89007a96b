"""A linear layer over a 4-bit weight (QLoRA, Dettmers et al. 2023, equation 5): y = x·Wᵀ + bias, gradient for x.

A few tokens read the packed bytes once and never make a weight (csrc/linear). More tokens: in bfloat16 the weight is
decoded inside the product (multiply.py); in other dtypes a panel of it is decoded into a scratch that stays in cache,
and torch's matmul takes it from there. The backward for x does the same over panels of columns, so that each sum is
one matmul, as in the reference.
Letters: B tokens, O out_features, I in_features.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from entrenar import native
from entrenar.native import abi
from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.linear.multiply import Term, WeightView, codebook_weight, multiply
from entrenar.ops.linear.panels import panel_step, scratch_for
from entrenar.ops.registration import define, differentiate

FEW_TOKENS, PACKED_TOKENS = abi.constants("kMaxTokens", "kMaxPackedTokens")

_forward_few = native.Function("linear_codebook")
_backward_few = native.Function("linear_codebook_backward")
_panel = native.Function("dequantize_codebook_panel")


def linear_codebook(
    x: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None = None,
) -> Tensor:
    """y = x·Wᵀ + bias with W = codebook[code] · scale rounded to the dtype of x; gradient reaches x and bias.

    Args:
        x: (..., I) float; packed: (ceil(O·I/2),) uint8; scales: as ops/scales.py holds them; codebook: (16,) float32;
        bias: (O,) of x's dtype.
    Returns:
        (..., O) in the dtype of x.
    """
    return torch.ops.entrenar.linear_codebook(x, packed, scales, codebook, block_size, out_features, bias)


def _reference(
    x: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    weight = dequantize_codebook(packed, scales, codebook, block_size, out_features * x.shape[-1], x.dtype)
    return F.linear(x, weight.view(out_features, x.shape[-1]), bias)


def _native(
    x: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    weight = codebook_weight(packed, scales, codebook, block_size, (out_features, x.shape[-1]))
    y = codebook_product(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], out_features)


def codebook_product(x: Tensor, weight: WeightView, bias: Tensor | None) -> Tensor:
    """X (B, I) · Wᵀ + bias (B, O), natively, where `accepts` allows it."""
    tokens, bias = x.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(len(tokens), weight.view.rows)
    multiplies = x.dtype == torch.bfloat16
    if len(tokens) <= (PACKED_TOKENS if multiplies else FEW_TOKENS):
        view = ctypes.addressof(weight.view)
        _forward_few(view, tokens, bias, y, len(tokens), native.DTYPES[tokens.dtype], native.threads())
    elif multiplies:
        multiply([Term(tokens, weight, transposed=True)], y, bias=bias)
    else:
        _forward_panels(tokens, weight, bias, y)
    return y


def _forward_panels(tokens: Tensor, weight: WeightView, bias: Tensor | None, y: Tensor) -> None:
    """Y (B, O), a panel of rows of W at a time."""
    rows, columns = weight.view.rows, weight.view.columns
    step = panel_step(rows, columns * y.element_size())
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        panel = _decoded(weight, slice(start, stop), slice(0, columns), y.dtype)
        if bias is None:
            torch.mm(tokens, panel.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], tokens, panel.t(), out=y[:, start:stop])


def _backward_reference(
    grad: Tensor, packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, in_features: int
) -> Tensor:
    weight = dequantize_codebook(packed, scales, codebook, block_size, grad.shape[-1] * in_features, grad.dtype)
    return grad @ weight.view(grad.shape[-1], in_features)


def _backward_native(
    grad: Tensor, packed: Tensor, scales: list[Tensor], codebook: Tensor, block_size: int, in_features: int
) -> Tensor:
    weight = codebook_weight(packed, scales, codebook, block_size, (grad.shape[-1], in_features))
    dx = codebook_transposed_product(grad.reshape(-1, grad.shape[-1]), weight)
    return dx.view(*grad.shape[:-1], in_features)


def codebook_transposed_product(grad: Tensor, weight: WeightView) -> Tensor:
    """Grad (B, O) · W (B, I), natively, where `accepts` allows it."""
    tokens = grad.contiguous()
    dx = grad.new_empty(len(tokens), weight.view.columns)
    if len(tokens) <= FEW_TOKENS:
        view = ctypes.addressof(weight.view)
        _backward_few(view, tokens, dx, len(tokens), native.DTYPES[grad.dtype], native.threads())
    elif grad.dtype == torch.bfloat16:
        multiply([Term(tokens, weight, transposed=False)], dx)
    else:
        _backward_panels(tokens, weight, dx)
    return dx


def _backward_panels(tokens: Tensor, weight: WeightView, dx: Tensor) -> None:
    """Dx (B, I), a panel of columns of W at a time."""
    rows, columns = weight.view.rows, weight.view.columns
    step = panel_step(columns, rows * dx.element_size())
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        panel = _decoded(weight, slice(0, rows), slice(start, stop), dx.dtype)
        torch.mm(tokens, panel, out=dx[:, start:stop])


def _decoded(weight: WeightView, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """A panel of the weight, in this thread's scratch: valid until the next one."""
    height, width, of = rows.stop - rows.start, columns.stop - columns.start, weight.view
    out = scratch_for(height * width, dtype).view(height, width)
    _panel(
        *weight.tensors, out, of.rows * of.columns, of.columns, rows.start, height, columns.start, width,
        of.block_size, native.DTYPES[dtype], native.threads(),
    )  # fmt: skip
    return out


def accepts(x: Tensor, codebook: Tensor, block_size: int, bias: Tensor | None = None) -> bool:
    """Whether the native kernels take x, or a gradient, with such a weight."""
    fits = x.dtype in native.DTYPES and codebook.dtype == torch.float32 and block_size % 2 == 0
    return fits and (bias is None or bias.dtype == x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
    x, packed, scales, codebook, ctx.block_size, _, bias = inputs
    ctx.in_features, ctx.wants_bias = x.shape[-1], bias is not None and bias.requires_grad
    ctx.save_for_backward(packed, codebook, *scales)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed, codebook, *scales = ctx.saved_tensors
    wants_x, wants_bias = ctx.needs_input_grad[0], ctx.wants_bias
    dx = None
    if wants_x:
        arguments = (packed, scales, codebook, ctx.block_size, ctx.in_features)
        dx = torch.ops.entrenar.linear_codebook_backward(grad, *arguments)
    return dx, None, [None] * len(scales), None, None, None, grad.flatten(0, -2).sum(0) if wants_bias else None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
    grad, packed, scales, codebook, ctx.block_size, _ = inputs
    ctx.out_features = grad.shape[-1]
    ctx.save_for_backward(packed, codebook, *scales)


def _second_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed, codebook, *scales = ctx.saved_tensors
    forward = linear_codebook(grad, packed, scales, codebook, ctx.block_size, ctx.out_features)
    return forward, None, [None] * len(scales), None, None, None


_WEIGHT = "Tensor packed, Tensor[] scales, Tensor codebook, int block_size"
define(
    f"linear_codebook(Tensor x, {_WEIGHT}, SymInt out_features, Tensor? bias) -> Tensor",
    reference=_reference,
    native_cpu=_native,
    fake=lambda x, _packed, _scales, _codebook, _size, out_features, _bias: x.new_empty(*x.shape[:-1], out_features),
    accepts=lambda x, _packed, _scales, codebook, size, _rows, bias: accepts(x, codebook, size, bias),
)
define(
    f"linear_codebook_backward(Tensor grad, {_WEIGHT}, SymInt in_features) -> Tensor",
    reference=_backward_reference,
    native_cpu=_backward_native,
    fake=lambda grad, _packed, _scales, _codebook, _size, in_features: grad.new_empty(*grad.shape[:-1], in_features),
    accepts=lambda grad, _packed, _scales, codebook, size, _columns: accepts(grad, codebook, size),
)
differentiate("linear_codebook", _gradients, _setup)
differentiate("linear_codebook_backward", _second_gradients, _setup_second)
