"""The two residual blocks of a decoder layer, h + f(norm(h)), each one native call a pass (csrc/block).

Only for bfloat16 on a CPU (`serves`); everything they are made of exists as an operation of its own,
and models/fast_forwards.py puts those together elsewhere. Gradients reach h and the low-rank factors.
Letters: B rows, T tokens, C hidden size, I inner size, H heads, G key-value heads, D width of a head, R rotated of D.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entrenar.ops import native
from entrenar.ops.adapted_native import (
    Factors,
    Member,
    MemberView,
    MemberViews,
    factors_of,
    forward_native,
    with_factors,
)
from entrenar.ops.gated_activation import KINDS


class Keep(Enum):
    """What a block keeps for its backward beside h: all it computed, what is dear to compute again, or nothing."""

    ALL = "all"
    DEAR = "dear"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Norm:
    """An RMS norm: weight (C,), frozen; see ops/rms_norm.py."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class MlpBlock:
    """h + down(act(gate(x)) · up(x)), x = norm(h); `activation` as in ops/gated_activation.py."""

    norm: Norm
    gate: Member
    up: Member
    down: Member
    activation: str


@dataclass(frozen=True)
class AttentionBlock:
    """h + output(attention(rotate(q(x)), rotate(k(x)), v(x))), x = norm(h); q and k may have norms over each head."""

    norm: Norm
    q: Member
    k: Member
    v: Member
    output: Member
    width: int
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None


Rotation = tuple[Tensor, Tensor]  # cos and sin, (B or 1, T, R) float


def serves(h: Tensor) -> bool:
    """Whether the blocks can be used for h (B, T, C)."""
    fits = h.dtype == torch.bfloat16 and h.dim() == 3 and h.numel() > 0
    return fits and native.is_eager(h) and native.available()


def mlp_block(h: Tensor, block: MlpBlock, keep: Keep) -> Tensor:
    """H (B, T, C) → (B, T, C)."""
    return _apply(_Mlp, h, block, (block.gate, block.up, block.down), keep)


def attention_block(
    h: Tensor, block: AttentionBlock, rotation: Rotation | None, starts: Tensor | None, keep: Keep
) -> Tensor:
    """H (B, T, C) → (B, T, C); causal, `starts` (B, T) int32 as in ops/attention.py."""
    return _apply(_Attention, h, block, (block.q, block.k, block.v, block.output), keep, rotation, starts)


def attention_inputs(h: Tensor, block: AttentionBlock, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
    """H (B, T, C) → what the block's attention takes, q (B, T, H·D), k and v (B, T, G·D); no gradient is recorded."""
    h, views = h.contiguous(), MemberViews((block.q, block.k, block.v, block.output))
    q, k, v = (h.new_empty(*h.shape[:2], member.weight.shape[0]) for member in (block.q, block.k, block.v))
    view = _attention_view(h, block, views, rotation)
    _set_buffers(view, {"h": h, "q": q, "k": k, "v": v})
    _run(_attention_inputs, view)
    return q, k, v


def attention_output(h: Tensor, o: Tensor, output: Member) -> Tensor:
    """H (B, T, C) + output(o), o (B, T, H·D): the end of an attention block; no gradient is recorded."""
    tokens = o.reshape(-1, o.shape[-1]).contiguous()
    return forward_native(tokens, [output], residual=h.reshape(-1, h.shape[-1]).contiguous())[0].view(h.shape)


def _apply(function: Any, h: Tensor, *arguments: Any) -> Tensor:
    members: Sequence[Member] = arguments[1]
    if not torch.is_grad_enabled():
        return function.compute(h.contiguous(), *arguments)[0]
    return function.apply(h.contiguous(), *arguments, *factors_of(members))


class _Buffer(ctypes.Structure):
    """csrc/block/block.h's BufferView."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class _Norm(ctypes.Structure):
    """csrc/block/block.h's NormView."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("dtype", ctypes.c_int32), ("eps", ctypes.c_float),
        ("offset", ctypes.c_float), ("unused", ctypes.c_int32),
    )  # fmt: skip


class _MlpView(ctypes.Structure):
    """csrc/block/mlp.cpp's MlpBlockView."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "inner")), ("norm", _Norm),
        *((name, _Buffer) for name in ("h", "x", "gate", "up", "product", "out", "dh")), ("members", MemberView * 3),
        ("activation", ctypes.c_int32), ("unused", ctypes.c_int32),
    )  # fmt: skip


class _AttentionView(ctypes.Structure):
    """csrc/block/attention.cpp's AttentionBlockView."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "hidden", "heads", "kv_heads", "width")),
        *((name, _Norm) for name in ("norm", "q_norm", "k_norm")),
        *((name, _Buffer) for name in ("h", "x", "q", "k", "v", "o", "lse", "out", "dh", "cos", "sin")),
        ("rotary_batches", ctypes.c_int64), ("rotated", ctypes.c_int64), ("starts", _Buffer),
        ("members", MemberView * 4), ("scale", ctypes.c_float), ("rotary_dtype", ctypes.c_int32),
    )  # fmt: skip


_mlp = native.Function("entrenar_mlp_block", "pi")
_mlp_backward = native.Function("entrenar_mlp_block_backward", "pi")
_attention = native.Function("entrenar_attention_block", "pi")
_attention_backward = native.Function("entrenar_attention_block_backward", "pi")
_attention_inputs = native.Function("entrenar_attention_inputs", "pi")


def _norm_view(norm: Norm | None) -> _Norm:
    if norm is None:
        return _Norm()
    weight = norm.weight.detach()
    return _Norm(*native.buffer(weight), native.DTYPES[weight.dtype], norm.eps, norm.offset, 0)


def _set_buffers(view: ctypes.Structure, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(view, name, tuple(native.buffer(tensor)))


def _run(function: native.Function, view: ctypes.Structure) -> None:
    function(ctypes.addressof(view), native.threads())


class _Block(torch.autograd.Function):
    """What both blocks do around their native calls; `kept` are names of buffers in the order they are saved."""

    @staticmethod
    def save(
        ctx: Any, h: Tensor, members: Sequence[Member], factors: Sequence[Tensor], kept: dict[str, Tensor]
    ) -> None:
        ctx.members, ctx.kept = members, tuple(kept)
        ctx.save_for_backward(h, *factors, *kept.values())

    @staticmethod
    def load(ctx: Any) -> tuple[Tensor, list[Member], dict[str, Tensor | None]]:
        h, *rest = ctx.saved_tensors
        count = len(factors_of(ctx.members))
        return h, with_factors(ctx.members, rest[:count]), dict(zip(ctx.kept, rest[count:], strict=True))

    @staticmethod
    def gradients(dh: Tensor, factors: Factors, nothing: int) -> tuple[Tensor | None, ...]:
        return dh, *[None] * nothing, *(gradient for pair in factors for gradient in pair if gradient is not None)


class _Mlp(_Block):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, h: Tensor, block: MlpBlock, members: Sequence[Member], keep: Keep, *factors: Tensor
    ) -> Tensor:
        ctx.block = block
        out, kept = _Mlp.compute(h, block, members, keep)
        _Block.save(ctx, h, members, factors, kept)
        return out

    @staticmethod
    def compute(h: Tensor, block: MlpBlock, members: Sequence[Member], keep: Keep) -> tuple[Tensor, dict[str, Tensor]]:
        """The result, and what is kept."""
        wide, out = (*h.shape[:2], block.gate.weight.shape[0]), torch.empty_like(h)
        kept: dict[str, Tensor] = {}
        if keep is not Keep.NOTHING:
            kept |= {name: h.new_empty(wide) for name in ("gate", "up")}
        if keep is Keep.ALL:
            kept |= {"x": torch.empty_like(h), "product": h.new_empty(wide)}
        views = MemberViews(members)
        view = _mlp_view(h, block, views)
        _set_buffers(view, {"h": h, "out": out, **kept})
        _run(_mlp, view)
        return out, kept

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        h, members, kept = _Block.load(ctx)
        views, dh = MemberViews(members), torch.empty_like(h)
        factors = views.add_gradients()
        grad, view = grad.contiguous(), _mlp_view(h, ctx.block, views)
        _set_buffers(view, {"h": h, "out": grad, "dh": dh, **kept})
        _run(_mlp_backward, view)
        return _Block.gradients(dh, factors(), nothing=3)


def _mlp_view(h: Tensor, block: MlpBlock, views: MemberViews) -> _MlpView:
    tokens = h.shape[0] * h.shape[1]
    return _MlpView(
        tokens, h.shape[2], block.gate.weight.shape[0], _norm_view(block.norm), members=views.array,
        activation=KINDS[block.activation],
    )  # fmt: skip


class _Attention(_Block):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, h: Tensor, block: AttentionBlock, members: Sequence[Member], keep: Keep, rotation: Rotation | None,
        starts: Tensor | None, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.block, ctx.rotation, ctx.starts = block, rotation, starts
        out, kept = _Attention.compute(h, block, members, keep, rotation, starts)
        _Block.save(ctx, h, members, factors, kept)
        return out

    @staticmethod
    def compute(
        h: Tensor, block: AttentionBlock, members: Sequence[Member], keep: Keep, rotation: Rotation | None,
        starts: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The result, and what is kept."""
        out, kept = torch.empty_like(h), _attention_kept(h, block, keep)
        views = MemberViews(members)
        view = _attention_view(h, block, views, rotation)
        _set_buffers(view, {"h": h, "out": out, "starts": starts, **kept})
        _run(_attention, view)
        return out, kept

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        h, members, kept = _Block.load(ctx)
        views, dh = MemberViews(members), torch.empty_like(h)
        factors = views.add_gradients()
        grad, view = grad.contiguous(), _attention_view(h, ctx.block, views, ctx.rotation)
        _set_buffers(view, {"h": h, "out": grad, "dh": dh, "starts": ctx.starts, **kept})
        _run(_attention_backward, view)
        return _Block.gradients(dh, factors(), nothing=5)


def _attention_kept(h: Tensor, block: AttentionBlock, keep: Keep) -> dict[str, Tensor]:
    if keep is Keep.NOTHING:
        return {}
    queries, keys = block.q.weight.shape[0], block.k.weight.shape[0]
    widths = {"q": queries, "k": keys, "v": keys, "o": queries} | ({"x": h.shape[2]} if keep is Keep.ALL else {})
    kept = {name: h.new_empty(*h.shape[:2], width) for name, width in widths.items()}
    return kept | {"lse": h.new_empty(h.shape[0], queries // block.width, h.shape[1], dtype=torch.float32)}


def _attention_view(h: Tensor, block: AttentionBlock, views: MemberViews, rotation: Rotation | None) -> _AttentionView:
    heads, kv_heads = (member.weight.shape[0] // block.width for member in (block.q, block.k))
    view = _AttentionView(
        *h.shape, heads, kv_heads, block.width, _norm_view(block.norm), _norm_view(block.q_norm),
        _norm_view(block.k_norm), members=views.array, scale=block.scale,
    )  # fmt: skip
    if rotation is not None:
        cos, sin = rotation
        _set_buffers(view, {"cos": cos, "sin": sin})
        view.rotary_batches, view.rotated, view.rotary_dtype = len(cos), cos.shape[-1], native.DTYPES[cos.dtype]
    return view
