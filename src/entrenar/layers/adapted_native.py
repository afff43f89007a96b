"""Adapted linear layers in one native call (csrc/adapted): what goes in, and what comes out.

Letters: B tokens, O out_features, I in_features, r rank.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from entrenar import native
from entrenar.native import abi
from entrenar.native.abi import GroupView, MemberView
from entrenar.native.cached import Cached, place
from entrenar.ops.linear.multiply import WeightView, dense_weight
from entrenar.ops.linear.weight import LinearWeight

_STRIP, _STEP = abi.constants("kStrip", "kStep")


@dataclass(frozen=True)
class AdaptedLinear:
    """One layer: weight (O, I), bias (O,), A (r, I) and B (O, r) (both or neither), and the adapter's scale."""

    weight: LinearWeight
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    _view: Cached["NativeMember"] = field(default_factory=Cached, init=False, repr=False, compare=False)

    def native(self) -> "NativeMember":
        """The layer as csrc/adapted takes it."""
        weight = self.weight.source()
        key = (id(weight), place(self.bias), place(self.a), place(self.b))
        return self._view.get(key, lambda: _native_of(self, weight), keeps=NativeMember.is_direct)


@dataclass(frozen=True)
class Used:
    """A member whose output, the `index`-th of its group, has a gradient (B, O)."""

    member: AdaptedLinear
    grad: Tensor
    index: int


def factors_of(members: Sequence[AdaptedLinear]) -> list[Tensor]:
    """A and B of every member that has them."""
    return [t for member in members for t in (member.a, member.b) if t is not None]


def with_factors(members: Sequence[AdaptedLinear], factors: Sequence[Tensor]) -> list[AdaptedLinear]:
    """The members over factors that were saved, whose changes since then autograd notices."""
    left, result = iter(factors), []
    for member in members:
        a, b = (None, None) if member.a is None else (next(left), next(left))
        result.append(member if member.a is a and member.b is b else replace(member, a=a, b=b))
    return result


def hidden_bytes(members: Sequence[AdaptedLinear], tokens: int) -> int:
    """Bytes of a group's products with its factors A, as csrc/adapted lays them out; 0 where no member has any."""
    width = sum(-(-member.a.shape[0] // _STRIP) * _STRIP for member in members if member.a is not None)
    return (tokens * width + _STEP) * 2 if width else 0


# Gradients of A and B, for every member in use.
Factors = list[tuple[Tensor | None, Tensor | None]]


def forward_native(tokens: Tensor, members: list[AdaptedLinear], residual: Tensor | None = None) -> list[Tensor]:
    """tokens (B, I) bfloat16 → every member's (B, O); with a residual (B, O) the only one's, and that added."""
    views = MemberViews(members)
    count, inner = tokens.shape
    outputs = [tokens.new_empty(count, member.weight.shape[0]) for member in members]
    for index, y in enumerate(outputs):
        views.place(index, y)
    _run(_forward, tokens, (count, inner), None, views, residual)
    return outputs


def backward_native(tokens: Tensor | None, used: list[Used], wants_x: bool) -> tuple[Tensor | None, Factors]:
    """The gradient of tokens (B, I), if wanted, and of every factor; tokens may be None where there are no factors."""
    grad, inner = used[0].grad, used[0].member.weight.shape[1]
    dx = grad.new_empty(len(grad), inner) if wants_x else None
    views = MemberViews([one.member for one in used])
    for index, one in enumerate(used):
        views.place(index, one.grad)
    gradients = add_gradients(views.array, [one.member for one in used])
    _run(_backward, tokens, (len(grad), inner), dx, views)
    return dx, gradients()


_forward = native.Function("adapted")
_backward = native.Function("adapted_backward")


def _run(
    function: native.Function, tokens: Tensor | None, shape: tuple[int, int], dx: Tensor | None, views: "MemberViews",
    residual: Tensor | None = None,
) -> None:  # fmt: skip
    group = GroupView(
        *native.buffer(tokens), *native.buffer(dx), *native.buffer(residual), None, 0, *shape, len(views.array),
        ctypes.addressof(views.array),
    )  # fmt: skip
    function(ctypes.addressof(group), native.threads())


class MemberViews:
    """An array of C views of members, and the tensors that they point into."""

    def __init__(self, members: Sequence[AdaptedLinear]) -> None:
        self.array = (MemberView * len(members))()
        self._alive: list[object] = []
        for index, member in enumerate(members):
            native_member = member.native()
            self.array[index] = native_member.view
            self._alive.append(native_member)

    def place(self, index: int, y: Tensor) -> None:
        """Where a member's result goes, or in a backward where its gradient is."""
        self.array[index].y, self.array[index].y_bytes = native.buffer(y)
        self._alive.append(y)


def add_gradients(views: ctypes.Array[MemberView], members: Sequence[AdaptedLinear]) -> Callable[[], Factors]:
    """Make room for the factors' gradients, one tensor for all of them.

    What comes back gives them, in the factors' dtypes, after the call.
    """
    factors = factors_of(members)
    room = torch.empty(sum(factor.numel() for factor in factors), dtype=torch.float32)
    at = room.data_ptr()
    for view, member in zip(views, members, strict=True):
        if member.a is not None and member.b is not None:
            view.da, view.da_bytes = at, member.a.numel() * room.itemsize
            view.db, view.db_bytes = at + view.da_bytes, member.b.numel() * room.itemsize
            at += view.da_bytes + view.db_bytes

    def gradients() -> Factors:
        parts, at = [], 0
        for factor in factors:
            part = room.as_strided(factor.shape, (factor.shape[1], 1), at)
            parts.append(part if factor.dtype == room.dtype else part.to(factor.dtype))
            at += factor.numel()
        left = iter(parts)
        return [(None, None) if member.a is None else (next(left), next(left)) for member in members]

    return gradients


class NativeMember(NamedTuple):
    """A member's view, without places for results, and what it points into; `direct`: none of that is a copy."""

    view: MemberView
    weight: WeightView
    tensors: tuple[Tensor, ...]
    direct: bool

    def is_direct(self) -> bool:
        """Whether the view may serve again."""
        return self.direct


def _native_of(member: AdaptedLinear, weight: WeightView) -> NativeMember:
    view, tensors = MemberView(weight=weight.view), list[Tensor]()
    if member.bias is not None:
        bias = member.bias.detach().to(torch.bfloat16).contiguous()
        view.bias, view.bias_bytes = native.buffer(bias)
        tensors.append(bias)
    if member.a is not None and member.b is not None:
        a, b = _usable(member.a), _usable(member.b)
        view.a, view.b = dense_weight(a).view, dense_weight(b).view
        view.rank, view.scale = len(a), member.scale
        tensors += [a, b]
    given = [tensor for tensor in (member.bias, member.a, member.b) if tensor is not None]
    direct = weight.lasting and list(map(place, given)) == list(map(place, tensors))
    return NativeMember(view, weight, tuple(tensors), direct)


def _usable(factor: Tensor) -> Tensor:
    """A factor as the native product reads it: float32 or bfloat16, its rows contiguous."""
    factor = factor.detach()
    fits = factor.dtype in (torch.float32, torch.bfloat16) and factor.stride(1) == 1
    return factor if fits else factor.float().contiguous()
