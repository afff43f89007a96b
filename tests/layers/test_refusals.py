"""Native calls that take a view of many buffers refuse each wrong size, short or missing buffer, and write nothing."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.layers.adapted_linear import adapted_linears
from entrenar.layers.adapted_native import AdaptedLinear
from entrenar.layers.recompute import Recompute
from entrenar.layers.residual_blocks import (
    AttentionBlock,
    MlpBlock,
    after_attention,
    attention_block,
    before_attention,
    mlp_block,
)
from entrenar.native.abi import AttentionBlockView, AttentionView, GroupView, MemberView, MlpBlockView
from entrenar.ops import attention
from entrenar.ops.linear.weight import CodebookWeight, Int8Weight
from entrenar.ops.scales import nest_scales
from tests.support.blocks import CODEBOOK, factors, member, norm
from tests.support.refusals import assert_refuses, fields

pytestmark = pytest.mark.usefixtures("native_path")

# Each function's view, and the fields of it that may be null.
VIEWS: dict[str, tuple[Any, set[str]]] = {
    "adapted": (GroupView, {"residual", "u"}),
    "adapted_backward": (GroupView, {"dx", "u"}),
    "attention": (AttentionView, {"starts"}),
    "attention_backward": (AttentionView, {"starts"}),
    "mlp_block": (
        MlpBlockView,
        {f"{name}.data" for name in ("x", "gate", "up", "product", "u", "down_u")},
    ),
    "attention_block": (
        AttentionBlockView,
        {f"{name}.data" for name in ("x", "q", "k", "v", "o", "lse", "u", "output_u", "starts")},
    ),
}
VIEWS["attention_inputs"] = (
    AttentionBlockView, {f"{name}.data" for name in ("x", "o", "lse", "u", "output_u", "out", "starts")},
)  # fmt: skip
VIEWS |= {f"{name}_backward": VIEWS[name] for name in ("mlp_block", "attention_block")}

Calls = Counter[str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Before every call to one of these functions all its spoiled variants are tried; how many there were of each."""
    calls, right = Calls(), native.Function.__call__

    def checked(self: native.Function, *args: Any) -> None:
        if self.name in VIEWS:
            calls[self.name] += _try_all(self.name, lambda *other: right(self, *other), args)
        right(self, *args)

    monkeypatch.setattr(native.Function, "__call__", checked)
    return calls


def _try_all(name: str, call: Callable[..., None], args: tuple[Any, ...]) -> int:
    kind, optional = VIEWS[name]
    view = kind.from_address(args[0])
    found = list(fields(view))
    if kind is GroupView:
        members = (MemberView * view.count).from_address(view.members)
        found += [field for index, one in enumerate(members) for field in fields(one, f"members[{index}].")]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    before = [tensor.clone().view(torch.uint8) for tensor in tensors]
    calls = assert_refuses(lambda: call(*args), found, lambda at: at in optional or at.endswith("bias"))
    for index, arg in enumerate(args):
        for wrong in (arg.flatten()[:-1], None) if isinstance(arg, Tensor) else ():
            with pytest.raises(InputError, match=r"too small|missing"):
                call(*args[:index], wrong, *args[index + 1 :])
            calls += 1
    assert all(torch.equal(tensor.view(torch.uint8), copy) for tensor, copy in zip(tensors, before, strict=True))
    return calls


def nested(rows: int, columns: int) -> AdaptedLinear:
    """A layer whose weight has nested scales, with factors and a bias."""
    packed = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8)
    weight = CodebookWeight(packed, nest_scales(torch.rand(rows * columns // 64)), CODEBOOK, 64, (rows, columns))
    a, b = torch.randn(3, columns).requires_grad_(), torch.randn(rows, 3).bfloat16().requires_grad_()
    return AdaptedLinear(weight, torch.randn(rows), a, b, 0.5)


def test_adapted_linears(refused: Calls) -> None:
    codes = torch.randint(0, 256, (8 * 32,), dtype=torch.uint8)
    bytes_ = AdaptedLinear(Int8Weight(codes, nest_scales(torch.rand(4)), 64, (8, 32)))
    members = [nested(64, 32), member(7, 32), member(9, 32, rank=0), bytes_]
    x = torch.randn(6, 32).bfloat16().requires_grad_()
    outputs = adapted_linears(x, members)
    torch.autograd.grad(outputs, [x, *factors(members)], [torch.ones_like(y) for y in outputs])
    assert refused["adapted"] > 150
    assert refused["adapted_backward"] > 150


def test_attention(refused: Calls) -> None:
    q, k, v = (torch.randn(2, 5, heads, 32).bfloat16().requires_grad_() for heads in (4, 2, 2))
    out = attention.causal_attention(q, k, v, 0.2, torch.zeros(2, 5, dtype=torch.int32))
    torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert refused["attention"] > 70
    assert refused["attention_backward"] > 70


@pytest.mark.parametrize("keep", [Recompute.NOTHING, Recompute.ALL])
def test_mlp_block(refused: Calls, keep: Recompute) -> None:
    block = MlpBlock(norm(32), nested(64, 32), member(64, 32), member(32, 64, bias=True), "silu")
    h = torch.randn(2, 3, 32).bfloat16().requires_grad_()
    out = mlp_block(h, block, keep)
    torch.autograd.grad(out, [h, *factors((block.gate, block.up, block.down))], torch.ones_like(out))
    assert refused["mlp_block"] > 200
    assert refused["mlp_block_backward"] > 200


def test_what_attention_takes(refused: Calls) -> None:
    members = (member(128, 32), nested(64, 32), member(64, 32, bias=True), member(32, 128, rank=0))
    block = AttentionBlock(norm(32), *members, 32, 0.2, norm(32), norm(32))
    cos, sin = torch.rand(2, 2, 5, 16)
    before_attention(torch.randn(2, 5, 32).bfloat16(), block, (cos, sin))
    assert refused["attention_inputs"] > 250


def test_a_residual(refused: Calls) -> None:
    h, o = torch.randn(2, 3, 7).bfloat16(), torch.randn(2, 3, 32).bfloat16()
    mlp = MlpBlock(norm(7), member(8, 7), member(8, 7), member(7, 8), "silu")
    after_attention(h, o, member(7, 32), mlp)
    assert refused["adapted"] > 40


@pytest.mark.parametrize("keep", [Recompute.NOTHING, Recompute.ALL])
def test_attention_block(refused: Calls, keep: Recompute) -> None:
    members = (member(128, 32), nested(64, 32), member(64, 32, bias=True), member(32, 128, rank=0))
    block = AttentionBlock(norm(32), *members, 32, 0.2, norm(32), norm(32))
    h = torch.randn(2, 5, 32).bfloat16().requires_grad_()
    cos, sin = torch.rand(2, 2, 5, 16)
    out = attention_block(h, block, (cos, sin), torch.zeros(2, 5, dtype=torch.int32), keep)
    torch.autograd.grad(out, [h, *factors(members)], torch.ones_like(out))
    assert refused["attention_block"] > 250
    assert refused["attention_block_backward"] > 250
