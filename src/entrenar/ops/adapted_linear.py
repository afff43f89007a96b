"""Linear layers that share an input, each a frozen weight with or without low-rank factors, as one autograd function.

y_j = x·W_jᵀ + bias_j + (x·A_jᵀ)·(scale_j·B_j)ᵀ (LoRA, Hu et al. 2021, section 4.1). For the backward only x (or
what makes it again, ops/recompute.py) is kept beside the weights: with u_j = x·A_jᵀ and v_j = g_j·(scale_j·B_j),

    dx = Σ g_j·W_j + v_j·A_j,    dA_j = v_jᵀ·x,    dB_j = scale_j·g_jᵀ·u_j.

In bfloat16 on a CPU that multiplies it each line is one native sum of products (ops/multiply.py): the adapter's product
joins the weight's before it is rounded, and the input's gradients of all members are one sum. Elsewhere plain
PyTorch.
Letters: B tokens, O out_features, I in_features, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from entrenar.ops import native
from entrenar.ops.linear_codebook import PACKED_TOKENS
from entrenar.ops.linear_weight import LinearWeight
from entrenar.ops.multiply import Term, dense_weight, multiply, native_multiply
from entrenar.ops.recompute import Recipe, recipe_of

_STEP = 32  # csrc/matmul/matmul.h's kStep: factors are laid out in whole steps, zeros behind


@dataclass(frozen=True)
class Member:
    """One layer: weight (O, I), bias (O,), A (r, I) and B (O, r) (both or neither), and the adapter's scale."""

    weight: LinearWeight
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


def adapted_linears(x: Tensor, members: Sequence[Member]) -> tuple[Tensor, ...]:
    """x (..., I) → one (..., O_j) per member, in the dtype of x; gradients reach x, biases, A and B."""
    if not native.is_plain(x):
        return tuple(_traced(x, member) for member in members)
    tensors = [tensor for member in members for tensor in (member.bias, member.a, member.b)]
    return _AdaptedLinears.apply(x, recipe_of(x), list(members), *tensors)  # pyright: ignore[reportReturnType]


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale·B(A(x)): x (..., I) → (..., O) in the dtype of x, out of plain operations."""
    return F.linear(F.linear(x, a.to(x.dtype)) * scale, b.to(x.dtype))


def _traced(x: Tensor, member: Member) -> Tensor:
    y = member.weight.traced(x, None if member.bias is None else member.bias.to(x.dtype))
    return y if member.a is None or member.b is None else y + low_rank(x, member.a, member.b, member.scale)


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, recipe: Recipe | None, members: list[Member], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.members, ctx.shape, ctx.make = members, x.shape, recipe.make if recipe else None
        ctx.set_materialize_grads(False)
        adapted = any(member.a is not None for member in members)
        factors = [tensor for index, tensor in enumerate(tensors) if index % 3]
        inputs = () if not adapted else recipe.inputs if recipe else (x,)
        ctx.save_for_backward(*factors, *inputs)
        tokens = _rows(x)
        run = _forward_native if _is_native(tokens) else _forward_reference
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in run(tokens, members))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Any, ...]:
        count = 2 * len(grads)
        factors, inputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        pairs = zip(factors[::2], factors[1::2], strict=True)
        used = [
            _Used(replace(member, a=a, b=b), _rows(grad), index)
            for index, (member, (a, b), grad) in enumerate(zip(ctx.members, pairs, grads, strict=True))
            if grad is not None
        ]
        if not used:
            return None, None, None, *[None] * (3 * len(grads))
        tokens = _rows(ctx.make(*inputs) if ctx.make else inputs[0]) if inputs else None
        run = _backward_native if _is_native(used[0].grad) else _backward_reference
        dx, gradients = run(tokens, used, ctx.needs_input_grad[0])
        found: list[Tensor | None] = [None] * (3 * len(grads))
        for one, (da, db) in zip(used, gradients, strict=True):
            if ctx.needs_input_grad[3 + 3 * one.index]:
                found[3 * one.index] = one.grad.sum(0)
            found[3 * one.index + 1], found[3 * one.index + 2] = da, db
        return None if dx is None else dx.view(ctx.shape), None, None, *found


@dataclass(frozen=True)
class _Used:
    """A member whose output has a gradient (B, O)."""

    member: Member
    grad: Tensor
    index: int

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        a, b = self.member.a, self.member.b
        return None if a is None or b is None else (a, b)


_Factors = list[tuple[Tensor | None, Tensor | None]]


def _rows(x: Tensor) -> Tensor:
    """(..., I) → (B, I), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _is_native(tokens: Tensor) -> bool:
    fits = tokens.dtype == torch.bfloat16 and len(tokens) > PACKED_TOKENS
    return fits and native.is_eager(tokens) and native_multiply()


def _forward_reference(tokens: Tensor, members: list[Member]) -> list[Tensor]:
    outputs = []
    for member in members:
        y = member.weight.product(tokens, None if member.bias is None else member.bias.to(tokens.dtype))
        if member.a is not None and member.b is not None:
            hidden = tokens @ member.a.to(y.dtype).t()
            y.addmm_(hidden, (member.b.to(y.dtype) * member.scale).t())
        outputs.append(y)
    return outputs


def _backward_reference(tokens: Tensor | None, used: list[_Used], wants_x: bool) -> tuple[Tensor | None, _Factors]:
    dx, factors = None, []
    for one in used:
        if wants_x:
            product = one.member.weight.transposed_product(one.grad)
            dx = product if dx is None else dx.add_(product)
        if one.factors is None or tokens is None:
            factors.append((None, None))
            continue
        (a, b), dtype = one.factors, tokens.dtype
        v = one.grad @ (b.to(dtype) * one.member.scale)
        if dx is not None:
            dx.addmm_(v, a.to(dtype))
        hidden = tokens @ a.to(dtype).t()
        factors.append(((v.t() @ tokens).to(a.dtype), ((one.grad.t() @ hidden) * one.member.scale).to(b.dtype)))
    return dx, factors


def _forward_native(tokens: Tensor, members: list[Member]) -> list[Tensor]:
    hidden = _hidden(tokens, [member.a for member in members])
    outputs = []
    for member, u in zip(members, hidden, strict=True):
        terms = [Term(tokens, member.weight.source(), transposed=True)]
        if u is not None and member.b is not None:
            terms.append(Term(u, dense_weight(member.b.detach(), member.scale), transposed=True))
        bias = None if member.bias is None else member.bias.to(tokens.dtype).contiguous()
        outputs.append(multiply(terms, tokens.new_empty(len(tokens), member.weight.shape[0]), bias=bias))
    return outputs


def _hidden(tokens: Tensor, factors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """x·A_jᵀ for every A_j (r_j, I), each (B, r_j up to whole steps): one product, which reads x once."""
    widths = [0 if a is None else _whole_steps(len(a)) for a in factors]
    if not any(widths):
        return [None] * len(factors)
    stacked = tokens.new_zeros(sum(widths), tokens.shape[1])
    for a, part in zip(factors, stacked.split(widths), strict=True):
        if a is not None:
            part[: len(a)].copy_(a.detach())
    together = multiply(
        [Term(tokens, dense_weight(stacked), transposed=True)], tokens.new_empty(len(tokens), sum(widths))
    )
    return [part if width else None for part, width in zip(together.split(widths, dim=1), widths, strict=True)]


def _whole_steps(rank: int) -> int:
    return -(-rank // _STEP) * _STEP


def _backward_native(tokens: Tensor | None, used: list[_Used], wants_x: bool) -> tuple[Tensor | None, _Factors]:
    passed = [_passed_back(one) for one in used]  # v_j
    dx = _input_gradient(used, passed) if wants_x else None
    if tokens is None:
        return dx, [(None, None)] * len(used)
    all_da = _gradients_of_a(tokens, passed)
    hidden = _hidden(tokens, [one.member.a for one in used])
    return dx, [_factor_gradients(*each) for each in zip(used, all_da, hidden, strict=True)]


def _passed_back(one: _Used) -> Tensor | None:
    """v = g·(scale·B), (B, r up to whole steps)."""
    if one.factors is None:
        return None
    b = one.factors[1].detach()
    out = one.grad.new_empty(len(one.grad), _whole_steps(b.shape[1]))
    return multiply([Term(one.grad, dense_weight(b, one.member.scale), transposed=False)], out)


def _input_gradient(used: list[_Used], passed: list[Tensor | None]) -> Tensor:
    """Σ g_j·W_j + v_j·A_j, (B, I)."""
    terms = []
    for one, v in zip(used, passed, strict=True):
        terms.append(Term(one.grad, one.member.weight.source(), transposed=False))
        if v is not None and one.factors is not None:
            terms.append(Term(v, dense_weight(one.factors[0].detach()), transposed=False))
    grad = used[0].grad
    return multiply(terms, grad.new_empty(len(grad), used[0].member.weight.shape[1]))


def _gradients_of_a(tokens: Tensor, passed: list[Tensor | None]) -> list[Tensor | None]:
    """v_jᵀ·x for every v_j, each (r_j up to whole steps, I) float32: one product, which reads x once."""
    present = [v for v in passed if v is not None]
    stacked = torch.cat(present, dim=1).t().contiguous()
    out = tokens.new_empty(len(stacked), tokens.shape[1], dtype=torch.float32)
    multiply([Term(stacked, dense_weight(tokens), transposed=False)], out)
    each = iter(out.split([v.shape[1] for v in present]))
    return [None if v is None else next(each) for v in passed]


def _factor_gradients(one: _Used, da: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """DA (r, I) and dB = scale·gᵀ·u (O, r) in the factors' dtypes."""
    if one.factors is None or da is None or u is None:
        return None, None
    a, b = one.factors
    db = u.new_empty(u.shape[1], len(b), dtype=torch.float32)
    multiply([Term(u.t().contiguous(), dense_weight(one.grad), transposed=False)], db, alpha=one.member.scale)
    return da[: len(a)].to(a.dtype), db[: len(a)].t().to(b.dtype)
