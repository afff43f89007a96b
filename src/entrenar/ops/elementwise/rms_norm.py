"""Root-mean-square norm (Zhang and Sennrich 2019): y = (weight + offset) · x / √(mean(x²) + eps), rounded once.

With r = 1 / √(mean(x²) + eps), w = weight + offset, h = grad · w:  dx = r · h − x · r³ · mean(h · x) and
dweight = Σ over rows of grad · x · r. The backward makes r again from x, which it reads anyway.
Letters: D features.
"""

from typing import Any

import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.elementwise.precision import widen
from entrenar.ops.gpu_kernels import GpuKernel, numbers
from entrenar.ops.registration import call, define, differentiate

_forward = native.Function("rms_norm")
_backward = native.Function("rms_norm_backward")
_weight = native.Function("rms_norm_backward_weight")


_WIDEST_ON_GPU = 1 << 15  # a program holds a row in registers


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """(weight + offset) · x / √(mean(x²) + eps) over the last dimension, in float32 (float64 for a float64 x).

    Args:
        x: (..., D) float; weight: (D,) float, of any float dtype.
        eps: as in the model's configuration. offset: 0 for Llama's norm, 1 for Gemma's.
    Returns:
        (..., D) in the dtype of x; gradients reach x and weight.

    Raises:
        InputError: weight is not (D,).
    """
    if weight.shape != x.shape[-1:]:
        raise InputError(f"the norm's weight is {list(weight.shape)}, its input {list(x.shape)}: give one per feature")
    return call("rms_norm", x, weight, eps, offset)


def _reciprocal(x: Tensor, eps: float) -> Tensor:
    """R of the head comment, (..., 1), for x in the dtype of computation."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _reference(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide, factor = widen(x, weight)
    return (wide * _reciprocal(wide, eps) * (factor + offset)).to(x.dtype)


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None
) -> Tensor:
    wide, upstream, factor = widen(x, grad, weight)
    r, h = _reciprocal(wide, eps), upstream * (factor + offset)
    dx = r * h - wide * (r**3 * (h * wide).mean(-1, keepdim=True))
    return (dx if residual is None else dx + residual).to(x.dtype)


def _weight_reference(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide, upstream = widen(x, grad)
    return (upstream * wide * _reciprocal(wide, eps)).unsqueeze(0).flatten(0, -2).sum(0).to(weight.dtype)


def _native(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward(x.contiguous(), weight.contiguous(), y, *_rows(x), eps, offset, *_dtypes(x, weight), native.threads())
    return y


def _backward_native(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None
) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _backward(
        grad.contiguous(), x.contiguous(), weight.contiguous(), None if residual is None else residual.contiguous(), dx,
        *_rows(x), eps, offset, *_dtypes(x, weight), native.threads(),
    )  # fmt: skip
    return dx


def _gpu(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    if x.shape[-1] > _WIDEST_ON_GPU:
        return _reference(x, weight, eps, offset)
    from entrenar.ops.elementwise import triton as elementwise_gpu

    return elementwise_gpu.rms_norm(x, weight, eps, offset)


def _backward_gpu(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None
) -> Tensor:
    if x.shape[-1] > _WIDEST_ON_GPU:
        return _backward_reference(grad, x, weight, eps, offset, residual)
    from entrenar.ops.elementwise import triton as elementwise_gpu

    return elementwise_gpu.rms_norm_backward(grad, x, weight, eps, offset, residual)


def _backward_samples(device: torch.device) -> list[tuple[Any, ...]]:
    grad, x, weight = numbers(device, 3, 40).sin(), numbers(device, 3, 40), numbers(device, 40)
    return [(grad, x, weight, 1e-5, offset, residual) for offset in (0.0, 1.0) for residual in (None, x.cos())]


def _forward_samples(device: torch.device) -> list[tuple[Any, ...]]:
    x, weight = numbers(device, 3, 40), numbers(device, 40)
    # Both offsets; rows so small that eps decides.
    return [(rows, weight, 1e-5, offset) for offset in (0.0, 1.0) for rows in (x, x * 1e-3)]


def _weight_native(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _weight(grad.contiguous(), x.contiguous(), dweight, *_rows(x), eps, *_dtypes(x, weight), native.threads())
    return dweight


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // max(x.shape[-1], 1), x.shape[-1]


def _dtypes(x: Tensor, weight: Tensor) -> tuple[int, int]:
    return native.DTYPES[x.dtype], native.DTYPES[weight.dtype]


def _accepts(x: Tensor, weight: Tensor, _eps: float, _offset: float) -> bool:
    return x.dtype in native.DTYPES and weight.dtype in native.DTYPES


def _backward_accepts(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, residual: Tensor | None = None
) -> bool:
    fits = residual is None or residual.dtype == x.dtype
    return fits and grad.dtype == x.dtype and _accepts(x, weight, eps, offset)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    dx = call("rms_norm_backward", grad, x, weight, ctx.eps, ctx.offset, None) if wants_x else None
    dweight = call("rms_norm_backward_weight", grad, x, weight, ctx.eps) if wants_weight else None
    return dx, dweight, None, None


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


define(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
    reference=_reference,
    native_cpu=_native,
    gpu=GpuKernel(_gpu, _forward_samples),
    fake=lambda x, _weight, _eps, _offset: _like(x),
    accepts=_accepts,
)
define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, float offset, Tensor? residual) -> Tensor",
    reference=_backward_reference,
    native_cpu=_backward_native,
    gpu=GpuKernel(_backward_gpu, _backward_samples),
    fake=lambda _grad, x, *_: _like(x),
    accepts=_backward_accepts,
)
define(
    "rms_norm_backward_weight(Tensor grad, Tensor x, Tensor weight, float eps) -> Tensor",
    reference=_weight_reference,
    native_cpu=_weight_native,
    fake=lambda _grad, _x, weight, _eps: _like(weight),
    accepts=_backward_accepts,
)
differentiate("rms_norm", _gradients, _setup)
