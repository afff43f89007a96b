"""Rotary position embedding (Su et al. 2021) in the half-split order of Hugging Face's checkpoints.

The first R of D elements of a head turn: y = x · cos + rotate_half(x) · sin, rotate_half(x₁, x₂) = (−x₂, x₁); the rest
are copied. The gradient is the transpose of that linear map, which is another turn only where the halves of cos and sin
are equal; none is assumed here. Letters: B batch, T tokens, H heads, D head width, R rotated width.
"""

from typing import Any

import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.elementwise.precision import widen
from entrenar.ops.gpu_kernels import GpuKernel, numbers
from entrenar.ops.registration import call, define, differentiate

_rotate = native.Function("rotary")


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first R elements of each head turned by the angles of its position, in float32 and rounded once.

    Args:
        x: (B, T, H, D) float, of any strides; it is read in place if the elements of a head are side by side.
        cos, sin: (B, T, R) or (1, T, R) float of one dtype, R even; they get no gradient.
    Returns:
        (B, T, H, D), contiguous, in the dtype of x.

    Raises:
        InputError: the shapes do not fit.
    """
    if not _fit(x, cos) or sin.shape != cos.shape or sin.dtype != cos.dtype:
        raise InputError(
            f"rotary: cos is {list(cos.shape)} {cos.dtype}, sin {list(sin.shape)} {sin.dtype}, x {list(x.shape)}: "
            "for x (B, T, H, D) both are (B, T, R) or (1, T, R), of one dtype, with R even and at most D"
        )
    return call("rotary", x, cos, sin, False)


def _fit(x: Tensor, cos: Tensor) -> bool:
    if x.dim() != 4 or cos.dim() != 3:
        return False
    batches, tokens, rotated = cos.shape
    return batches in (1, len(x)) and tokens == x.shape[1] and rotated <= x.shape[3] and rotated % 2 == 0


def _reference(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    rotated = cos.shape[-1]
    wide, c, s = widen(x[..., :rotated], cos.unsqueeze(2), sin.unsqueeze(2))
    turned = wide * c + (-_rotate_half(wide * s) if transpose else _rotate_half(wide) * s)
    return torch.cat((turned.to(x.dtype), x[..., rotated:]), dim=-1)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _native(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = _fake(x, cos, sin, transpose)
    _rotate(
        x, cos.contiguous(), sin.contiguous(), out, *x.shape, cos.shape[-1], *x.stride()[:3], len(cos),
        native.DTYPES[x.dtype], native.DTYPES[cos.dtype], int(transpose), native.threads(),
    )  # fmt: skip
    return out


def _gpu(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    from entrenar.ops.elementwise import triton as elementwise_gpu

    return elementwise_gpu.rotary(x, cos, sin, transpose)


def _samples(device: torch.device) -> list[tuple[Any, ...]]:
    x, angles = numbers(device, 2, 3, 2, 8), numbers(device, 1, 3, 6)
    return [(x, angles.cos(), angles.sin(), transpose) for transpose in (False, True)]


def _fake(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:  # noqa: ARG001 - one signature
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _accepts(x: Tensor, cos: Tensor, sin: Tensor, _transpose: bool) -> bool:
    return x.dtype in native.DTYPES and cos.dtype in native.DTYPES and sin.dtype == cos.dtype


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
    _, cos, sin, ctx.transpose = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return call("rotary", grad, *ctx.saved_tensors, not ctx.transpose), None, None, None


define(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool transpose) -> Tensor",
    reference=_reference,
    native_cpu=_native,
    gpu=GpuKernel(_gpu, _samples),
    fake=_fake,
    accepts=_accepts,
)
differentiate("rotary", _gradients, _setup)
