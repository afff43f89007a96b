"""Adapted linear layers out of PyTorch's products: on any device, in any float dtype.

On a GPU a small batch waits for the host, so launches are what counts: the factors are copied to the tokens' dtype
all at once, those named A one below the other, so that x·Aᵀ of all members is one product, and so is its gradient.
Letters: B tokens, O out_features, I in_features, r rank, R the ranks of all members together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from entrenar.layers.adapted_native import AdaptedLinear, Factors, Used, factors_of
from entrenar.ops.linear.weight import LinearWeight


class _Copies(NamedTuple):
    """Factors in the dtype of the tokens: A (R, I); scale·B (O, r) and its columns of R, by the member's index."""

    a: Tensor
    b: dict[int, Tensor]
    columns: dict[int, slice]


def rows_of(x: Tensor) -> Tensor:
    """(..., I) → (B, I), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def forward_composed(
    tokens: Tensor, members: Sequence[AdaptedLinear], residual: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """tokens (B, I) → every member's (B, O), the residual (B, O) added; and x·Aᵀ (B, R), which the backward may use."""
    copies, outputs = _copies(members, tokens.dtype), []
    hidden = None if copies is None else tokens @ copies.a.t()
    for index, member in enumerate(members):
        y = member.weight.product(tokens, None if member.bias is None else member.bias.to(tokens.dtype))
        if copies is not None and hidden is not None and index in copies.b:
            y.addmm_(hidden[:, copies.columns[index]], copies.b[index].t())
        outputs.append(y if residual is None else y.add_(residual))
    return outputs, hidden


def backward_composed(
    tokens: Tensor | None, used: Sequence[Used], wants_x: bool, hidden: Tensor | None = None
) -> tuple[Tensor | None, Factors]:
    """The gradient of tokens (B, I), if wanted, and of every factor.

    Args:
        tokens: may be None where there are no factors.
        hidden: of `forward_composed`, if every one of its members is used; None: it is made again.
    """
    members, dtype, dx = [one.member for one in used], used[0].grad.dtype, None
    for one in used if wants_x else ():
        dx = _transposed_product(one.grad, one.member.weight, dx)
    copies = _copies(members, dtype)
    if copies is None or tokens is None:
        return dx, [(None, None)] * len(used)
    v = tokens.new_empty(len(tokens), len(copies.a))
    for index, b in copies.b.items():
        torch.mm(used[index].grad, b, out=v[:, copies.columns[index]])
    if dx is not None:
        dx.addmm_(v, copies.a)
    hidden = tokens @ copies.a.t() if hidden is None else hidden
    da = _gradient(v.t(), tokens)
    db = {index: _gradient(used[index].grad.t(), hidden[:, copies.columns[index]]) for index in copies.b}
    torch._foreach_mul_(list(db.values()), [members[index].scale for index in db])  # pyright: ignore[reportPrivateImportUsage]
    pairs = ((index, member.a, member.b) for index, member in enumerate(members))
    return dx, [
        (None, None) if a is None or b is None else (da[copies.columns[index]].to(a.dtype), db[index].to(b.dtype))
        for index, a, b in pairs
    ]


def _copies(members: Sequence[AdaptedLinear], dtype: torch.dtype) -> _Copies | None:
    """None where no member has factors."""
    factors = [factor.detach() for factor in factors_of(members)]
    if not factors:
        return None
    adapted = [index for index, member in enumerate(members) if member.a is not None]
    # All A first, so that they lie together.
    ordered = [*factors[::2], *factors[1::2]]
    parts = ordered[0].new_empty(sum(map(Tensor.numel, ordered)), dtype=dtype).split([f.numel() for f in ordered])
    copies = [part.view(factor.shape) for part, factor in zip(parts, ordered, strict=True)]
    torch._foreach_copy_(copies, ordered)  # pyright: ignore[reportPrivateImportUsage]
    scaled = dict(zip(adapted, copies[len(adapted) :], strict=True))
    torch._foreach_mul_(list(scaled.values()), [members[index].scale for index in adapted])  # pyright: ignore[reportPrivateImportUsage]
    columns, ranks = {}, 0
    for index, a in zip(adapted, ordered, strict=False):
        columns[index], ranks = slice(ranks, ranks + len(a)), ranks + len(a)
    inner = ordered[0].shape[1]
    return _Copies(copies[0].as_strided((ranks, inner), (inner, 1)), scaled, columns)


def _transposed_product(grad: Tensor, weight: LinearWeight, onto: Tensor | None) -> Tensor:
    """Grad (B, O) · W (B, I), added to a tensor, in place, if one is given."""
    if onto is None:
        return weight.transposed_product(grad)
    if grad.device.type == "cpu":  # where no weight is decoded whole
        return onto.add_(weight.transposed_product(grad))
    return onto.addmm_(grad, weight.decoded(grad.dtype))


def _gradient(left: Tensor, right: Tensor) -> Tensor:
    """left·right in float32 at least, where a GPU's product can."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
