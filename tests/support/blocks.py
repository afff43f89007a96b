"""Residual blocks over random weights in 4 bits, and the same out of float64 matrices."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from entrenar.layers.adapted_native import AdaptedLinear
from entrenar.layers.residual_blocks import (
    MlpBlock,
    Norm,
)
from entrenar.ops.linear.weight import CodebookWeight

CODEBOOK = torch.linspace(-1, 1, 16)


def member(rows: int, columns: int, rank: int = 4, bias: bool = False) -> AdaptedLinear:
    count = rows * columns
    packed = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    scale = 2.5 / columns**0.5
    weight = CodebookWeight(packed, [torch.rand(-(-count // 64)) * scale], CODEBOOK, 64, (rows, columns))
    b = torch.randn(rows) * 0.1 if bias else None
    if not rank:
        return AdaptedLinear(weight, b)
    a, other = torch.randn(rank, columns) / columns**0.5, torch.randn(rows, rank) * 0.2
    return AdaptedLinear(weight, b, a.requires_grad_(), other.requires_grad_(), 0.5)


def norm(columns: int, offset: float = 0.0) -> Norm:
    return Norm((1 - offset + torch.randn(columns) * 0.2).bfloat16(), 1e-5, offset)


def factors(members: Sequence[AdaptedLinear]) -> list[Tensor]:
    return [factor for one in members for factor in (one.a, one.b) if factor is not None]


class Exact:
    """float64 stand-ins of the operations, over leaves of the factors."""

    def __init__(self, members: Sequence[AdaptedLinear]) -> None:
        self.leaves = [factor.detach().double().requires_grad_() for factor in factors(members)]
        left = iter(self.leaves)
        self._pairs = {id(one): (next(left), next(left)) for one in members if one.a is not None}

    def linear(self, x: Tensor, one: AdaptedLinear) -> Tensor:
        dense = one.weight.product(torch.eye(one.weight.shape[1])).t().double()
        y = F.linear(x, dense, None if one.bias is None else one.bias.double())
        if id(one) not in self._pairs:
            return y
        a, b = self._pairs[id(one)]
        return y + one.scale * (x @ a.t()) @ b.t()

    def norm(self, x: Tensor, one: Norm | None) -> Tensor:
        if one is None:
            return x
        return x * (x.square().mean(-1, keepdim=True) + one.eps).rsqrt() * (one.weight.double() + one.offset)

    def mlp(self, h: Tensor, block: MlpBlock) -> Tensor:
        x = self.norm(h, block.norm)
        acts = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
        product = acts[block.activation](self.linear(x, block.gate)) * self.linear(x, block.up)
        return h + self.linear(product, block.down)


def assert_close(found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for one, other in zip(found, exact, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 0.02, f"{error} of {tuple(other.shape)}"  # some bfloat16 roundings of 2^-9, one after the other
