"""Causal attention with grouped heads (FlashAttention-2, Dao 2023).

Query t attends the keys from starts[t] to t, which says documents and sliding windows alike; in a tree of sequences
(data/tree.py) a branch also leaves out a gap, what of the trunk it does not follow and the branches before it. bfloat16
on a CPU runs natively (csrc/attention), a block of rows at a time; everything else through PyTorch's
scaled_dot_product_attention with a mask.
Letters: B rows, T tokens, H heads, G key-value heads (H a multiple of G), D width of a head.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from entrenar import native
from entrenar.native import abi
from entrenar.native.abi import AttentionView, HeadsView
from entrenar.ops.registration import call, define, differentiate

_STEP, _WIDEST = abi.constants(
    "kStep", "kMaxPlainWidth"
)  # a head's width must be whole steps of csrc/matmul, and not wider than its rows of zeros


_attention = native.Function("attention")
_attention_backward = native.Function("attention_backward")


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None = None) -> Tensor:
    """softmax(scale · q·kᵀ)·v over the keys each token attends; gradients reach q, k and v.

    Args:
        q: (B, T, H, D) float; k, v: (B, T, G, D); D contiguous, other strides any.
        starts: (B, T) int32, the first key of each token, never falling along T; or (B, T, 3): the first key, and the
            keys from the second number up to the third that are not attended. None: the row's first.
    Returns:
        (B, T, H, D), contiguous.
    """
    return call("causal_attention", q, k, v, scale, starts)[0]


def native_width(width: int) -> bool:
    """Whether the native kernels take heads of this width."""
    return width % _STEP == 0 and 0 < width <= _WIDEST


def attention_mask(starts: Tensor) -> Tensor:
    """Which keys each query attends: starts (B, T) or (B, T, 3) → (B, T, T) bool."""
    index = torch.arange(starts.shape[1], device=starts.device)
    first, *gap = starts.unsqueeze(-1).unbind(2) if starts.dim() == 3 else (starts[..., None],)
    attended = (index <= index[:, None]) & (index >= first)
    return attended & ~((index >= gap[0]) & (index < gap[1])) if gap else attended


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    mask = None if starts is None else attention_mask(starts).unsqueeze(1)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    return _dense(q, k, v, scale, starts), _lse_like(q).fill_(torch.nan)  # not kept: the backward starts afresh


def _reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _lse: Tensor, scale: float,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.enable_grad():
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        dq, dk, dv = torch.autograd.grad(_dense(q, k, v, scale, starts), (q, k, v), grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _native(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, starts = _prepared(q, k, v, starts)
    view = _view(q, k, v, scale, starts)
    out, lse = q.new_empty(q.shape), _lse_like(q)
    _attention(ctypes.addressof(view), out, lse, native.threads())
    return out, lse


def _native_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, starts = _prepared(q, k, v, starts)
    view = _view(q, k, v, scale, starts)
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    _attention_backward(ctypes.addressof(view), out.contiguous(), grad.contiguous(), lse, dq, dk, dv, native.threads())
    return dq, dk, dv


def _prepared(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return q, k, v, None if starts is None else starts.to(torch.int32).contiguous()


def _view(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> AttentionView:
    return AttentionView(
        *q.shape[:3], k.shape[2], q.shape[3], *native.buffer(starts), scale, 0,
        *(_heads(tensor) for tensor in (q, k, v)),
    )  # fmt: skip


def _heads(tensor: Tensor) -> HeadsView:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return HeadsView(tensor.data_ptr(), reach * tensor.element_size(), *tensor.stride()[:3])


def _lse_like(q: Tensor) -> Tensor:
    """(B, H, T): the logarithm of each row's sum of exponentials."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def _accepts(q: Tensor, *_rest: Any) -> bool:
    return q.dtype == torch.bfloat16 and native_width(q.shape[-1]) and q.numel() > 0


def _accepts_backward(_grad: Tensor, q: Tensor, _k: Tensor, _v: Tensor, _out: Tensor, lse: Tensor, *_rest: Any) -> bool:
    return _accepts(q) and not lse[0, 0, 0].isnan()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, starts = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 5
    q, k, v, out, lse, starts = ctx.saved_tensors
    arguments = (grad, q, k, v, out, lse, ctx.scale, starts)
    return *call("causal_attention_backward", *arguments), None, None


_ARGUMENTS = "Tensor q, Tensor k, Tensor v"
define(
    f"causal_attention({_ARGUMENTS}, float scale, Tensor? starts) -> (Tensor, Tensor)",
    reference=_reference,
    native_cpu=_native,
    fake=lambda q, _k, _v, _scale, _starts: (q.new_empty(q.shape), _lse_like(q)),
    accepts=_accepts,
)
define(
    f"causal_attention_backward(Tensor grad, {_ARGUMENTS}, Tensor out, Tensor lse, float scale,"
    " Tensor? starts) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    native_cpu=_native_backward,
    fake=lambda _grad, q, k, v, *_: tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v)),
    accepts=_accepts_backward,
)
differentiate("causal_attention", _gradients, _setup)
