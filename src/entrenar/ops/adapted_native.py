"""Adapted linear layers in one native call (csrc/adapted): what goes in, and what comes out.

Letters: B tokens, O out_features, I in_features, r rank.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.ops import native
from entrenar.ops.linear_weight import LinearWeight
from entrenar.ops.multiply import Source, dense_weight


@dataclass(frozen=True)
class Member:
    """One layer: weight (O, I), bias (O,), A (r, I) and B (O, r) (both or neither), and the adapter's scale."""

    weight: LinearWeight
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Used:
    """A member whose output, the `index`-th of its group, has a gradient (B, O)."""

    member: Member
    grad: Tensor
    index: int

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A and B, if it has them."""
        a, b = self.member.a, self.member.b
        return None if a is None or b is None else (a, b)


# Gradients of A and B, for every member in use.
Factors = list[tuple[Tensor | None, Tensor | None]]


def forward_native(tokens: Tensor, members: list[Member]) -> list[Tensor]:
    """tokens (B, I) bfloat16 → every member's (B, O)."""
    call = _Call(tokens, (tokens.shape[0], tokens.shape[1]), None, len(members))
    outputs = []
    for index, member in enumerate(members):
        y = tokens.new_empty(len(tokens), member.weight.shape[0])
        call.add(index, member, y)
        if member.bias is not None:
            call.add_bias(index, member.bias.detach().to(y.dtype).contiguous())
        outputs.append(y)
    call.run(_forward)
    return outputs


def backward_native(tokens: Tensor | None, used: list[Used], wants_x: bool) -> tuple[Tensor | None, Factors]:
    """The gradient of tokens (B, I), if wanted, and of every factor; tokens may be None where there are no factors."""
    grad, inner = used[0].grad, used[0].member.weight.shape[1]
    dx = grad.new_empty(len(grad), inner) if wants_x else None
    call = _Call(tokens, (len(grad), inner), dx, len(used))
    found: Factors = []
    for index, one in enumerate(used):
        call.add(index, one.member, one.grad)
        if one.factors is None:
            found.append((None, None))
            continue
        a, b = (torch.empty(factor.shape, dtype=torch.float32) for factor in one.factors)
        call.add_gradients(index, a, b)
        found.append((a, b))
    call.run(_backward)
    return dx, [_in_dtype_of(one, each) for one, each in zip(used, found, strict=True)]


def _in_dtype_of(one: Used, gradients: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    da, db = gradients
    if one.factors is None or da is None or db is None:
        return None, None
    return da.to(one.factors[0].dtype), db.to(one.factors[1].dtype)


class _MemberView(ctypes.Structure):
    """csrc/adapted/adapted.cpp's MemberView."""

    _fields_ = (
        ("weight", Source), ("a", Source), ("b", Source), ("bias", ctypes.c_void_p), ("bias_bytes", ctypes.c_int64),
        ("y", ctypes.c_void_p), ("y_bytes", ctypes.c_int64), ("da", ctypes.c_void_p), ("da_bytes", ctypes.c_int64),
        ("db", ctypes.c_void_p), ("db_bytes", ctypes.c_int64), ("rank", ctypes.c_int64), ("scale", ctypes.c_float),
        ("unused", ctypes.c_int32),
    )  # fmt: skip


class _GroupView(ctypes.Structure):
    """csrc/adapted/adapted.cpp's GroupView."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("x_bytes", ctypes.c_int64), ("dx", ctypes.c_void_p), ("dx_bytes", ctypes.c_int64),
        ("tokens", ctypes.c_int64), ("inner", ctypes.c_int64), ("count", ctypes.c_int64), ("members", ctypes.c_void_p),
    )  # fmt: skip


_forward = native.Function("entrenar_adapted", "pi")
_backward = native.Function("entrenar_adapted_backward", "pi")


class _Call:
    """One native call over a group, and the tensors that its views point into."""

    def __init__(self, tokens: Tensor | None, shape: tuple[int, int], dx: Tensor | None, count: int) -> None:
        self._members = (_MemberView * count)()
        self._held: list[object] = [tokens, dx]
        x, members = native.buffer(tokens), ctypes.addressof(self._members)
        self._group = _GroupView(*x, *native.buffer(dx), *shape, count, members)

    def add(self, index: int, member: Member, y: Tensor) -> None:
        """Fill in a member: `y` is its result, or in a backward its gradient."""
        view, weight = self._members[index], member.weight.source()
        view.weight = weight.view
        view.y, view.y_bytes = native.buffer(y)
        self._held += [weight, y]
        if member.a is not None and member.b is not None:
            a, b = dense_weight(_usable(member.a)), dense_weight(_usable(member.b))
            view.a, view.b, view.rank, view.scale = a.view, b.view, len(member.a), member.scale
            self._held += [a, b]

    def add_bias(self, index: int, bias: Tensor) -> None:
        """A bias (O,) bfloat16."""
        self._members[index].bias, self._members[index].bias_bytes = native.buffer(bias)
        self._held.append(bias)

    def add_gradients(self, index: int, da: Tensor, db: Tensor) -> None:
        """Where the factors' gradients go: (r, I) and (O, r) float32."""
        view = self._members[index]
        view.da, view.da_bytes = native.buffer(da)
        view.db, view.db_bytes = native.buffer(db)
        self._held += [da, db]

    def run(self, function: native.Function) -> None:
        """Call it."""
        function(ctypes.addressof(self._group), native.threads())


def _usable(factor: Tensor) -> Tensor:
    """A factor as the native product reads it: float32 or bfloat16, its rows contiguous."""
    factor = factor.detach()
    fits = factor.dtype in (torch.float32, torch.bfloat16) and factor.stride(1) == 1
    return factor if fits else factor.float().contiguous()
