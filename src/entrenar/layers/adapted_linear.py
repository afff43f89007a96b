"""Linear layers that share an input, each a frozen weight with or without low-rank factors, as one autograd function.

y_j = x·W_jᵀ + bias_j + (x·A_jᵀ)·(scale_j·B_j)ᵀ (LoRA, Hu et al. 2021, section 4.1). For the backward only x (or
what makes it again, layers/recompute.py) is kept beside the weights: with u_j = x·A_jᵀ and v_j = g_j·(scale_j·B_j),

    dx = Σ g_j·W_j + v_j·A_j,    dA_j = v_jᵀ·x,    dB_j = scale_j·g_jᵀ·u_j.

In bfloat16 on a CPU, forward and backward are one native call each (csrc/adapted): every line is a
sum of products, so that the adapter's product joins the weight's before it is rounded, and the input's gradients of
all members are one sum. Elsewhere PyTorch's products (layers/adapted_composed.py).
Letters: B tokens, O out_features, I in_features, r rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from entrenar import native
from entrenar.layers.adapted_composed import backward_composed, forward_composed, rows_of
from entrenar.layers.adapted_native import (
    AdaptedLinear,
    Used,
    backward_native,
    factors_of,
    forward_native,
    with_factors,
)
from entrenar.layers.recompute import Recipe, recipe_of
from entrenar.ops.linear.codebook import PACKED_TOKENS


def adapted_linears(x: Tensor, members: Sequence[AdaptedLinear]) -> tuple[Tensor, ...]:
    """x (..., I) → one (..., O_j) per member, in the dtype of x; gradients reach x, biases, A and B."""
    if not native.is_plain(x):
        return tuple(_traced(x, member) for member in members)
    if not torch.is_grad_enabled():
        return _outputs(x, list(members))  # an autograd function without a gradient costs as much as a small layer
    tensors = [t for member in members for t in (member.bias, member.a, member.b) if t is not None]
    return _AdaptedLinears.apply(x, recipe_of(x), list(members), *tensors)  # pyright: ignore[reportReturnType]


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale·B(A(x)): x (..., I) → (..., O) in the dtype of x, out of plain operations."""
    return F.linear(F.linear(x, a.to(x.dtype)) * scale, b.to(x.dtype))


def _traced(x: Tensor, member: AdaptedLinear) -> Tensor:
    y = member.weight.traced(x, None if member.bias is None else member.bias.to(x.dtype))
    return y if member.a is None or member.b is None else y + low_rank(x, member.a, member.b, member.scale)


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, recipe: Recipe | None, members: list[AdaptedLinear], *_: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.members, ctx.shape, ctx.make = members, x.shape, recipe.make if recipe else None
        ctx.set_materialize_grads(False)
        factors = factors_of(members)
        inputs = () if not factors else recipe.inputs if recipe else (x,)
        ctx.save_for_backward(*factors, *inputs)
        return _outputs(x, members)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a checkpointed layer unpacks what was saved at each access
        count = len(factors_of(ctx.members))
        members, inputs = with_factors(ctx.members, saved[:count]), saved[count:]
        pairs = enumerate(zip(members, grads, strict=True))
        used = [Used(member, rows_of(grad), index) for index, (member, grad) in pairs if grad is not None]
        if not used:
            return (None,) * len(ctx.needs_input_grad)
        tokens = rows_of(ctx.make(*inputs) if ctx.make else inputs[0]) if inputs else None
        many = len(used[0].grad) > PACKED_TOKENS  # few are faster one by one, over the packed bytes
        run = backward_native if many and _is_native(used[0].grad) else backward_composed
        dx, gradients = run(tokens, used, ctx.needs_input_grad[0])
        given = {one.index: (one.grad, *pair) for one, pair in zip(used, gradients, strict=True)}
        gradients_of: list[Tensor | None] = []
        for index, member in enumerate(members):
            grad, da, db = given.get(index, (None, None, None))
            if member.bias is not None:
                wanted = ctx.needs_input_grad[3 + len(gradients_of)]
                gradients_of.append(grad.sum(0) if grad is not None and wanted else None)
            gradients_of += [] if member.a is None else [da, db]
        return None if dx is None else dx.view(ctx.shape), None, None, *gradients_of


def _outputs(x: Tensor, members: list[AdaptedLinear]) -> tuple[Tensor, ...]:
    tokens = rows_of(x)
    outputs = forward_native(tokens, members) if _is_native(tokens) else forward_composed(tokens, members)[0]
    if x.dim() == 2:
        return tuple(outputs)
    # Not a view for autograd, which forbids a model to add in place to one that was made in here (Falcon does).
    return tuple(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]) for y in outputs)


def _is_native(tokens: Tensor) -> bool:
    return tokens.dtype == torch.bfloat16 and native.is_eager(tokens) and native.available()
