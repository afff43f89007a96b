"""The two residual blocks of a decoder layer, h + f(norm(h)), each one native call a pass (csrc/block).

Only for bfloat16 on a CPU (`serves`). On a GPU composed_blocks.py puts a layer together of operations, and elsewhere
models/acceleration/fast_forwards.py does. Gradients reach h and the low-rank factors.
Letters: B rows, T tokens, C hidden size, I inner size, H heads, G key-value heads, D width of a head, R rotated of D.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entrenar import native
from entrenar.layers.adapted_native import (
    AdaptedLinear,
    Factors,
    MemberView,
    NativeMember,
    add_gradients,
    factors_of,
    forward_native,
    hidden_bytes,
    with_factors,
)
from entrenar.layers.recompute import Recompute
from entrenar.native.abi import AttentionBlockView, MlpBlockView, NormView
from entrenar.native.cached import Cached
from entrenar.ops.elementwise.gated_activation import KINDS


@dataclass(frozen=True)
class Norm:
    """An RMS norm: weight (C,), frozen; see ops/elementwise/rms_norm.py."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class MlpBlock:
    """h + down(act(gate(x)) · up(x)), x = norm(h); `activation` as in ops/elementwise/gated_activation.py."""

    norm: Norm
    gate: AdaptedLinear
    up: AdaptedLinear
    down: AdaptedLinear
    activation: str
    _prepared: "Cached[_Prepared]" = field(default_factory=Cached, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class AttentionBlock:
    """h + output(attention(rotate(q(x)), rotate(k(x)), v(x))), x = norm(h); q and k may have norms over each head."""

    norm: Norm
    q: AdaptedLinear
    k: AdaptedLinear
    v: AdaptedLinear
    output: AdaptedLinear
    width: int
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    _prepared: "Cached[_Prepared]" = field(default_factory=Cached, init=False, repr=False, compare=False)


_ALIGNMENT = 64  # bytes, of a buffer among those that share one tensor
Rotation = tuple[Tensor, Tensor]  # cos and sin, (B or 1, T, R) float


def serves(h: Tensor) -> bool:
    """Whether the blocks can be used for h (B, T, C)."""
    fits = h.dtype == torch.bfloat16 and h.dim() == 3 and h.numel() > 0
    return fits and native.is_eager(h) and native.available()


def mlp_block(h: Tensor, block: MlpBlock, recompute: Recompute) -> Tensor:
    """H (B, T, C) → (B, T, C)."""
    return _apply(h, (_Mlp(block),), recompute)


def attention_block(
    h: Tensor, block: AttentionBlock, rotation: Rotation | None, starts: Tensor | None, recompute: Recompute
) -> Tensor:
    """H (B, T, C) → (B, T, C); causal, `starts` (B, T) int32 as in ops/attention.py."""
    return _apply(h, (_Attention(block, rotation, starts),), recompute)


def decoder_layer(
    h: Tensor,
    attention: AttentionBlock,
    mlp: MlpBlock,
    rotation: Rotation | None,
    starts: Tensor | None,
    recompute: Recompute,
) -> Tensor:
    """Both, one after the other, as one node of autograd's graph."""
    return _apply(h, (_Attention(attention, rotation, starts), _Mlp(mlp)), recompute)


def before_attention(
    h: Tensor, block: AttentionBlock, rotation: Rotation | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H (B, T, C) → h, and what attention takes: q (B, T, H·D), k and v (B, T, G·D); no gradient is recorded."""
    h, one = h.contiguous(), _Attention(block, rotation)
    q, k, v = (h.new_empty(*h.shape[:2], member.weight.shape[0]) for member in (block.q, block.k, block.v))
    prepared = _prepared(one, h, one.members, Recompute.ALL)
    _run(_attention_inputs, _fresh_view(one, prepared, {"h": h, "q": q, "k": k, "v": v}, h.new_empty(0)))
    return h, q, k, v


def after_attention(h: Tensor, attended: Tensor, output: AdaptedLinear, block: MlpBlock) -> Tensor:
    """H (B, T, C) + output(attended), attended (B, T, H·D), and the MLP's block of that; no gradient is recorded."""
    tokens = attended.reshape(-1, attended.shape[-1]).contiguous()
    added = forward_native(tokens, [output], residual=h.reshape(-1, h.shape[-1]))[0]
    return mlp_block(added.view(h.shape), block, Recompute.ALL)


_attention_inputs = native.Function("attention_inputs")


class _Layout(NamedTuple):
    """Where in one tensor the buffers lie that a pass saves: name, first byte and bytes of each; bytes of all."""

    places: list[tuple[str, int, int]]
    size: int


class _Prepared(NamedTuple):
    """A pass's view but for the buffers of one call, what it points into, and where what is saved will lie."""

    natives: list[NativeMember]
    view: ctypes.Structure
    saved: _Layout

    def is_direct(self) -> bool:
        """Whether the view may serve again."""
        return all(member.direct for member in self.natives)


@dataclass(frozen=True)
class _Mlp:
    """An MLP block as a pass over h takes it."""

    block: MlpBlock
    forward: ClassVar = native.Function("mlp_block")
    backward: ClassVar = native.Function("mlp_block_backward")

    @property
    def members(self) -> tuple[AdaptedLinear, ...]:
        return self.block.gate, self.block.up, self.block.down

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        return (self.block.norm,)

    def saved(self, h: Tensor, recompute: Recompute) -> dict[str, int]:
        """What the backward reads beside h: bytes by the names of the view's buffers."""
        if recompute is Recompute.ALL:
            return {}
        block, tokens = self.block, h.shape[0] * h.shape[1]
        wide = tokens * block.gate.weight.shape[0] * h.itemsize
        saved = {"gate": wide, "up": wide} | (
            {"x": h.nbytes, "product": wide} if recompute is Recompute.NOTHING else {}
        )
        hidden = {
            "u": hidden_bytes((block.gate, block.up), tokens),
            "down_u": hidden_bytes((block.down,), tokens),
        }
        return saved | hidden

    def view(self, h: Tensor, members: ctypes.Array[MemberView]) -> MlpBlockView:
        """The block as C takes it, without buffers."""
        block, tokens = self.block, h.shape[0] * h.shape[1]
        inner, activation = block.gate.weight.shape[0], KINDS[block.activation]
        return MlpBlockView(tokens, h.shape[2], inner, _norm_view(block.norm), members=members, activation=activation)

    def set_call(self, view: Any) -> None:
        """Nothing else differs from call to call."""


@dataclass(frozen=True)
class _Attention:
    """An attention block as a pass over h takes it."""

    block: AttentionBlock
    rotation: Rotation | None
    starts: Tensor | None = None
    forward: ClassVar = native.Function("attention_block")
    backward: ClassVar = native.Function("attention_block_backward")

    @property
    def members(self) -> tuple[AdaptedLinear, ...]:
        return self.block.q, self.block.k, self.block.v, self.block.output

    @property
    def norms(self) -> tuple[Norm | None, ...]:
        return self.block.norm, self.block.q_norm, self.block.k_norm

    def saved(self, h: Tensor, recompute: Recompute) -> dict[str, int]:
        """What the backward reads beside h: bytes by the names of the view's buffers."""
        if recompute is Recompute.ALL:
            return {}
        block, tokens = self.block, h.shape[0] * h.shape[1]
        queries, keys = (tokens * member.weight.shape[0] * h.itemsize for member in (block.q, block.k))
        saved = {"q": queries, "k": keys, "v": keys, "o": queries} | (
            {"x": h.nbytes} if recompute is Recompute.NOTHING else {}
        )
        hidden = {
            "u": hidden_bytes((block.q, block.k, block.v), tokens),
            "output_u": hidden_bytes((block.output,), tokens),
        }
        return saved | hidden | {"lse": tokens * (block.q.weight.shape[0] // block.width) * 4}

    def view(self, h: Tensor, members: ctypes.Array[MemberView]) -> AttentionBlockView:
        """The block as C takes it, without buffers."""
        block = self.block
        heads, kv_heads = (member.weight.shape[0] // block.width for member in (block.q, block.k))
        norms = map(_norm_view, self.norms)
        return AttentionBlockView(*h.shape, heads, kv_heads, block.width, *norms, members=members, scale=block.scale)

    def set_call(self, view: Any) -> None:
        """Set what differs from call to call beside h."""
        _set_buffers(view, {"starts": self.starts})
        if self.rotation is not None:
            cos, sin = self.rotation
            _set_buffers(view, {"cos": cos, "sin": sin})
            view.rotary_batches, view.rotated, view.rotary_dtype = len(cos), cos.shape[-1], native.DTYPES[cos.dtype]


_Pass = _Mlp | _Attention


def _prepared(one: _Pass, h: Tensor, members: Sequence[AdaptedLinear], recompute: Recompute) -> _Prepared:
    """What the block's last call was prepared with, if it still is right."""
    natives = [member.native() for member in members]
    norms = [(norm.weight.data_ptr(), norm.weight.dtype) for norm in one.norms if norm is not None]

    def make() -> _Prepared:
        view = one.view(h, (MemberView * len(natives))(*(member.view for member in natives)))
        return _Prepared(natives, view, _layout(one.saved(h, recompute)))

    return one.block._prepared.get((h.shape, recompute, norms, *map(id, natives)), make, keeps=_Prepared.is_direct)


def _layout(sizes: dict[str, int]) -> _Layout:
    places, at = [], 0
    for name, size in sizes.items():
        if size:
            places.append((name, at, size))
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return _Layout(places, at)


def _norm_view(norm: Norm | None) -> NormView:
    if norm is None:
        return NormView()
    weight = norm.weight.detach()
    return NormView(*native.buffer(weight), native.DTYPES[weight.dtype], norm.eps, norm.offset, 0)


def _fresh_view(one: _Pass, prepared: _Prepared, buffers: dict[str, Tensor], room: Tensor) -> Any:
    """A view for one call: another thread may make one over the same block."""
    view = type(prepared.view).from_buffer_copy(prepared.view)
    _set_buffers(view, buffers)
    at = room.data_ptr()
    for name, begin, size in prepared.saved.places:
        setattr(view, name, (at + begin, size))
    one.set_call(view)
    return view


def _set_buffers(view: ctypes.Structure, tensors: Mapping[str, Tensor | None]) -> None:
    """Let a view's buffers of these names be these tensors."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(view, name, tuple(native.buffer(tensor)))


def _run(function: native.Function, view: ctypes.Structure) -> None:
    function(ctypes.addressof(view), native.threads())


def _apply(h: Tensor, passes: Sequence[_Pass], recompute: Recompute) -> Tensor:
    h = h.contiguous()
    if torch.is_grad_enabled():
        return _Blocks.apply(h, passes, recompute, *factors_of(_members(passes)))
    for one in passes:
        h = _forward(one, h, recompute)[0]
    return h


def _members(passes: Sequence[_Pass]) -> list[AdaptedLinear]:
    return [member for one in passes for member in one.members]


def _forward(one: _Pass, h: Tensor, recompute: Recompute) -> tuple[Tensor, Tensor]:
    """The result, and room that holds all that is kept."""
    prepared = _prepared(one, h, one.members, recompute)
    out, room = torch.empty_like(h), h.new_empty(prepared.saved.size // h.itemsize)
    _run(one.forward, _fresh_view(one, prepared, {"h": h, "out": out}, room))
    return out, room


def _backward(
    one: _Pass, h: Tensor, members: Sequence[AdaptedLinear], recompute: Recompute, room: Tensor, grad: Tensor
) -> tuple[Tensor, Factors]:
    """The gradients of h and of the factors."""
    prepared, dh = _prepared(one, h, members, recompute), torch.empty_like(h)
    view = _fresh_view(one, prepared, {"h": h, "out": grad, "dh": dh}, room)
    factors = add_gradients(view.members, members)
    _run(one.backward, view)
    return dh, factors()


class _Blocks(torch.autograd.Function):
    """Passes one after the other."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, h: Tensor, passes: Sequence[_Pass], recompute: Recompute, *factors: Tensor
    ) -> Tensor:
        ctx.passes, ctx.recompute, saved = passes, recompute, []
        for one in passes:
            out, room = _forward(one, h, recompute)
            saved += [h, room]
            h = out
        ctx.save_for_backward(*factors, *saved)
        return h

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        members, gradients = with_factors(_members(ctx.passes), saved[: -2 * len(ctx.passes)]), Factors()
        grad = grad.contiguous()
        for one in reversed(ctx.passes):
            room, h = saved.pop(), saved.pop()
            members_of_pass = members[-len(one.members) :]
            del members[-len(one.members) :]
            grad, factors = _backward(one, h, members_of_pass, ctx.recompute, room, grad)
            gradients = factors + gradients
        return grad, None, None, *(gradient for pair in gradients for gradient in pair if gradient is not None)
