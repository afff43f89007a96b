"""Gated activations (Shazeer 2020): act(gate) · up, with gradients that need gate and up only.

act(x) = x · factor(x): σ(x) for silu; Φ(x) for gelu (Hendrycks and Gimpel 2016); for gelu_tanh σ(2u) with
u = √(2/π) · (x + 0.044715 x³), which is (1 + tanh u) / 2 without its cancellation below zero.
"""

import math
from typing import Any

import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.native import abi
from entrenar.ops.elementwise.precision import widen
from entrenar.ops.gpu_kernels import GpuKernel, numbers
from entrenar.ops.registration import call, define, differentiate

KINDS: dict[str, int] = dict(
    zip(("silu", "gelu", "gelu_tanh"), abi.constants("kSilu", "kGelu", "kGeluTanh"), strict=True)
)
_GPU_KINDS = ("silu", "gelu_tanh")  # Triton's erf would cancel below zero
_SCALE, _CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
_FLAT = 20.0  # beyond, factor is 0 or 1 to the last bit of float64: the cube of a huge x must not overflow

_forward = native.Function("gated_activation")
_backward = native.Function("gated_activation_backward")


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """act(gate) · up, computed in float32 (float64 for float64) and rounded once; gradients reach both.

    Without gradients to track (in an autograd.Function, say, which recomputes it) it is the plain forward, and
    `gated_activation_backward` its plain backward.

    Args:
        gate, up: float, of one shape and dtype.
        kind: silu, gelu, or gelu_tanh (transformers' gelu_pytorch_tanh).
    Returns:
        As gate, contiguous.

    Raises:
        InputError: shapes or dtypes differ, or the kind is unknown.
    """
    _check(kind, gate, up)
    return call("gated_activation", gate, up, kind)


def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from that of act(gate) · up; all of one shape and dtype."""
    _check(kind, gate, up, grad)
    return call("gated_activation_backward", grad, gate, up, kind)


def _check(kind: str, *tensors: Tensor) -> None:
    if kind not in KINDS:
        raise InputError(f"unknown activation {kind!r}: the gated ones are {', '.join(KINDS)}")
    first = tensors[0]
    for other in tensors[1:]:
        if other.shape != first.shape or other.dtype != first.dtype:
            raise InputError(
                f"a gated activation got {list(first.shape)} {first.dtype} and {list(other.shape)} {other.dtype}: "
                "give tensors of one shape and dtype"
            )


def _factor_and_slope(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """factor(x), and act'(x)."""
    if kind == "silu":
        factor = torch.sigmoid(x)
        return factor, factor + x * torch.sigmoid(-x) * factor
    if kind == "gelu":
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        factor = 0.5 * torch.special.erfc(x * -math.sqrt(0.5))
        return factor, factor + x * density
    near = x.clamp(-_FLAT, _FLAT)
    twice_u = near * (_SCALE * (1 + _CUBE * near.square()))
    steepness = _SCALE * (1 + 3 * _CUBE * near.square())
    factor = torch.sigmoid(twice_u)
    return factor, factor + near * steepness * torch.sigmoid(-twice_u) * factor


def _reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    x, other = widen(gate, up)
    return (x * _factor_and_slope(x, kind)[0] * other).to(gate.dtype).contiguous()


def _backward_reference(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    x, other, upstream = widen(gate, up, grad)
    factor, slope = _factor_and_slope(x, kind)
    dgate, dup = upstream * other * slope, upstream * (x * factor)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


def _native(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    out = _like(gate)
    _forward(gate.contiguous(), up.contiguous(), out, gate.numel(), *_codes(gate, kind))
    return out


def _backward_native(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dgate, dup = _like(gate), _like(gate)
    dense = [tensor.contiguous() for tensor in (grad, gate, up)]
    _backward(*dense, dgate, dup, gate.numel(), *_codes(gate, kind))
    return dgate, dup


def _gpu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    if kind not in _GPU_KINDS:
        return _reference(gate, up, kind)
    from entrenar.ops.elementwise import triton as elementwise_gpu

    return elementwise_gpu.gated_activation(gate, up, kind)


def _backward_gpu(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind not in _GPU_KINDS:
        return _backward_reference(grad, gate, up, kind)
    from entrenar.ops.elementwise import triton as elementwise_gpu

    return elementwise_gpu.gated_activation_backward(grad, gate, up, kind)


def _samples(device: torch.device) -> list[tuple[Any, ...]]:
    x = numbers(device, 50)
    return [(x.cos(), x, x.sin(), kind) for kind in _GPU_KINDS]


def _codes(gate: Tensor, kind: str) -> tuple[int, int, int]:
    return KINDS[kind], native.DTYPES[gate.dtype], native.threads()


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _accepts(*args: Any) -> bool:
    *tensors, _ = args
    return tensors[0].dtype in native.DTYPES and all(tensor.dtype == tensors[0].dtype for tensor in tensors)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - torch's signature
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *call("gated_activation_backward", grad, *ctx.saved_tensors, ctx.kind), None


define(
    "gated_activation(Tensor gate, Tensor up, str kind) -> Tensor",
    reference=_reference,
    native_cpu=_native,
    gpu=GpuKernel(_gpu, lambda device: [args[1:] for args in _samples(device)]),
    fake=lambda gate, _up, _kind: _like(gate),
    accepts=_accepts,
)
define(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)",
    reference=_backward_reference,
    native_cpu=_backward_native,
    gpu=GpuKernel(_backward_gpu, _samples),
    fake=lambda _grad, gate, _up, _kind: (_like(gate), _like(gate)),
    accepts=_accepts,
)
differentiate("gated_activation", _gradients, _setup)
