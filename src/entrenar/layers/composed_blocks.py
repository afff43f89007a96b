"""A decoder layer without its attention, as two autograd functions out of this room's operations: for GPUs.

What stands before attention gives q, k and v; what stands behind it, attention's output and the MLP, gives the layer's
result. Between them the model attends as it does. Beside their inputs the two keep what is dear to compute again: x·Aᵀ,
gate and up; norms and the activation are made once more in the backward. The blocks and letters are those of
layers/residual_blocks.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from entrenar import native
from entrenar.layers.adapted_composed import backward_composed, forward_composed, rows_of
from entrenar.layers.adapted_native import AdaptedLinear, Used, factors_of, with_factors
from entrenar.layers.residual_blocks import AttentionBlock, MlpBlock, Norm, Rotation
from entrenar.ops.elementwise import gated_activation, rms_norm, rotary  # noqa: F401 - registered when imported
from entrenar.ops.registration import compute

_Saved = list[Tensor | None]


def serves(h: Tensor) -> bool:
    """Whether the parts can be used for h (B, T, C); autocast would have layers compute in another dtype than h's."""
    fits = _is_on_gpu(h) and h.dim() == 3 and h.numel() > 0 and h.is_floating_point()
    return fits and native.is_plain(h) and not torch.is_autocast_enabled(h.device.type)


def _is_on_gpu(h: Tensor) -> bool:
    return h.is_cuda


def before_attention(
    h: Tensor, block: AttentionBlock, rotation: Rotation | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H (B, T, C) → h itself, through which the residual's gradient comes, q (B, T, H·D), k and v (B, T, G·D)."""
    members = _inputs_of(block)
    if torch.is_grad_enabled():
        return _BeforeAttention.apply(h, block, rotation, *factors_of(members))  # pyright: ignore[reportReturnType]
    q, k, v = _before(h, block, rotation, members)[0]
    return h, q, k, v


def after_attention(h: Tensor, attended: Tensor, output: AdaptedLinear, block: MlpBlock) -> Tensor:
    """H (B, T, C) and what attention gave (B, T, H·D) → h₂ + mlp(norm(h₂)) with h₂ = h + output(attended)."""
    members = [output, *_of(block)]
    if torch.is_grad_enabled():
        return _AfterAttention.apply(h, attended, block, members, *factors_of(members))  # pyright: ignore[reportReturnType]
    return _after(h, attended, block, members)[0]


def _inputs_of(block: AttentionBlock) -> list[AdaptedLinear]:
    return [block.q, block.k, block.v]


def _of(block: MlpBlock) -> list[AdaptedLinear]:
    return [block.gate, block.up, block.down]


def _before(
    h: Tensor, block: AttentionBlock, rotation: Rotation | None, members: Sequence[AdaptedLinear]
) -> tuple[list[Tensor], _Saved]:
    """q, k and v; x·Aᵀ, and q and k before their norms, where they have some."""
    (q, k, v), hidden = forward_composed(rows_of(_normed(h, block.norm)), members)
    raw = [x if norm is not None else None for x, norm in ((q, block.q_norm), (k, block.k_norm))]
    turned = [_turned(x, h, block, norm, rotation) for x, norm in ((q, block.q_norm), (k, block.k_norm))]
    return [x.view(*h.shape[:2], -1) for x in (*turned, v)], [hidden, *raw]


def _turned(heads: Tensor, h: Tensor, block: AttentionBlock, norm: Norm | None, rotation: Rotation | None) -> Tensor:
    heads = heads.view(*h.shape[:2], -1, block.width)
    if norm is not None:
        heads = _normed(heads, norm)
    return heads if rotation is None else compute("rotary", heads, *rotation, False)


def _turned_back(
    grad: Tensor, raw: Tensor | None, block: AttentionBlock, norm: Norm | None, rotation: Rotation | None
) -> Tensor:
    """The gradient (B, T, H·D) of what `_turned` gave → that of what it took, (B·T, H·D)."""
    heads = grad.reshape(*grad.shape[:2], -1, block.width)
    if rotation is not None:
        heads = compute("rotary", heads, *rotation, True)
    if norm is not None and raw is not None:
        heads = _norm_backward(heads, raw.view(heads.shape), norm)
    return rows_of(heads.flatten(2))


class _BeforeAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, h: Tensor, block: AttentionBlock, rotation: Rotation | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        products, saved = _before(h, block, rotation, _inputs_of(block))
        ctx.block, ctx.rotation = block, rotation
        ctx.save_for_backward(h, *saved, *factors)
        return h, *products

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dh: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor | None, ...]:
        h, hidden, raw_q, raw_k, *factors = ctx.saved_tensors
        block, members = ctx.block, with_factors(_inputs_of(ctx.block), factors)
        dq = _turned_back(dq, raw_q, block, block.q_norm, ctx.rotation)
        dk = _turned_back(dk, raw_k, block, block.k_norm, ctx.rotation)
        x = rows_of(_normed(h, block.norm)) if factors else None
        dx, gradients = backward_composed(x, _used(members, dq, dk, rows_of(dv)), ctx.needs_input_grad[0], hidden)
        if dx is not None:
            dh = _norm_backward(dx.view(h.shape), h, block.norm, dh)
        return dh, None, None, *_flat(gradients)


def _after(h: Tensor, attended: Tensor, block: MlpBlock, members: Sequence[AdaptedLinear]) -> tuple[Tensor, _Saved]:
    """The result; h₂ (B·T, C), gate and up (B·T, I), and every x·Aᵀ."""
    output, gate, up, down = members
    (h2,), output_hidden = forward_composed(rows_of(attended), [output], rows_of(h))
    products, hidden = forward_composed(_normed(h2, block.norm), [gate, up])
    product = compute("gated_activation", *products, block.activation)
    (out,), down_hidden = forward_composed(product, [down], h2)
    return out.view(h.shape), [h2, *products, output_hidden, hidden, down_hidden]


class _AfterAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, h: Tensor, attended: Tensor, block: MlpBlock, members: list[AdaptedLinear], *factors: Tensor
    ) -> Tensor:
        out, saved = _after(h, attended, block, members)
        ctx.block, ctx.members = block, members
        ctx.save_for_backward(attended, *saved, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        attended, h2, gate, up, output_hidden, hidden, down_hidden, *factors = ctx.saved_tensors
        block, members, shape = ctx.block, with_factors(ctx.members, factors), grad.shape
        grad = rows_of(grad)
        product = None if down_hidden is None else compute("gated_activation", gate, up, block.activation)
        dproduct, last = backward_composed(product, _used(members[3:], grad), True, down_hidden)
        assert dproduct is not None  # asked for
        del product
        dgate, dup = compute("gated_activation_backward", dproduct, gate, up, block.activation)
        del dproduct
        x = None if hidden is None else _normed(h2, block.norm)
        dx, middle = backward_composed(x, _used(members[1:3], dgate, dup), True, hidden)
        assert dx is not None
        dh = _norm_backward(dx, h2, block.norm, grad)
        del x, dx, dgate, dup
        wanted = ctx.needs_input_grad[1]
        dattended, first = backward_composed(rows_of(attended), _used(members[:1], dh), wanted, output_hidden)
        before = None if dattended is None else dattended.view(attended.shape)
        return dh.view(shape), before, None, None, *_flat(first + middle + last)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return compute("rms_norm", x, norm.weight, norm.eps, norm.offset)


def _norm_backward(grad: Tensor, x: Tensor, norm: Norm, residual: Tensor | None = None) -> Tensor:
    return compute("rms_norm_backward", grad, x, norm.weight, norm.eps, norm.offset, residual)


def _used(members: Sequence[AdaptedLinear], *grads: Tensor) -> list[Used]:
    return [Used(member, grad, index) for index, (member, grad) in enumerate(zip(members, grads, strict=True))]


def _flat(gradients: Sequence[tuple[Tensor | None, Tensor | None]]) -> list[Tensor]:
    return [gradient for pair in gradients for gradient in pair if gradient is not None]
