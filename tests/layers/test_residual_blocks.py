"""The residual blocks against the same out of float64 matrices, with their gradients, whatever is kept."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

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
from entrenar.ops.elementwise.rotary import rotary
from entrenar.ops.linear.weight import DenseWeight
from tests.support.attention import exactly
from tests.support.blocks import Exact, assert_close, factors, member, norm

pytestmark = pytest.mark.usefixtures("native_path")


@pytest.mark.parametrize("keep", Recompute)
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "rank"), [((2, 40), 64, 96, 4), ((1, 7), 33, 130, 0), ((3, 1), 64, 64, 20)]
)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_mlp_block(
    keep: Recompute, tokens: tuple[int, int], hidden: int, inner: int, rank: int, activation: str
) -> None:
    block = MlpBlock(
        norm(hidden, offset=float(activation != "silu")), member(inner, hidden, rank),
        member(inner, hidden, rank, bias=True), member(hidden, inner, rank), activation,
    )  # fmt: skip
    members = (block.gate, block.up, block.down)
    h = torch.randn(*tokens, hidden).bfloat16().requires_grad_()
    out = mlp_block(h, block, keep)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [h, *factors(members)], grad)
    exact, wide = Exact(members), h.detach().double().requires_grad_()
    expected = exact.mlp(wide, block)
    assert_close([out - h], [expected - wide])
    assert_close(found, torch.autograd.grad(expected, [wide, *exact.leaves], grad.double()))


@pytest.mark.parametrize("keep", Recompute)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rotated", [0, 16, 32])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_block(keep: Recompute, norms: bool, rotated: int, documents: bool) -> None:
    batch, tokens, hidden, heads, kv_heads, width = 2, 45, 64, 4, 2, 32
    block = AttentionBlock(
        norm(hidden), member(heads * width, hidden, bias=True), member(kv_heads * width, hidden),
        member(kv_heads * width, hidden), member(hidden, heads * width), width, 0.2,
        norm(width) if norms else None, norm(width, offset=1.0) if norms else None,
    )  # fmt: skip
    members = (block.q, block.k, block.v, block.output)
    angles = torch.rand(batch, tokens, rotated // 2).repeat(1, 1, 2) * 6
    rotation = (angles.cos(), angles.sin()) if rotated else None
    starts = torch.tensor([[0] * 20 + [20] * 25, [0] * 45], dtype=torch.int32) if documents else None
    h = torch.randn(batch, tokens, hidden).bfloat16().requires_grad_()
    out = attention_block(h, block, rotation, starts, keep)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, [h, *factors(members)], grad)
    exact, wide = Exact(members), h.detach().double().requires_grad_()
    x = exact.norm(wide, block.norm)
    q, k, v = (exact.linear(x, one).unflatten(-1, (-1, width)) for one in (block.q, block.k, block.v))
    q, k = exact.norm(q, block.q_norm), exact.norm(k, block.k_norm)
    if rotated:
        q, k = (rotary(one, angles.cos().double(), angles.sin().double()) for one in (q, k))
    expected = wide + exact.linear(exactly(q, k, v, 0.2, starts).flatten(2), block.output)
    assert_close([out - h], [expected - wide])
    assert_close(found, torch.autograd.grad(expected, [wide, *exact.leaves], grad.double()))


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rotated", [0, 16, 32])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 45), (1, 1), (3, 1)])
def test_what_attention_takes_and_what_follows_it(norms: bool, rotated: int, batch: int, tokens: int) -> None:
    hidden, heads, kv_heads, width = 64, 4, 2, 32
    block = AttentionBlock(
        norm(hidden), member(heads * width, hidden, bias=True), member(kv_heads * width, hidden),
        member(kv_heads * width, hidden), member(hidden, heads * width), width, 0.2,
        norm(width) if norms else None, norm(width, offset=1.0) if norms else None,
    )  # fmt: skip
    angles = torch.rand(batch, tokens, rotated // 2).repeat(1, 1, 2) * 6
    h, o = torch.randn(batch, tokens, hidden).bfloat16(), torch.randn(batch, tokens, heads * width).bfloat16()
    same, *found = before_attention(h, block, (angles.cos(), angles.sin()) if rotated else None)
    assert same is h
    exact = Exact((block.q, block.k, block.v, block.output))
    x = exact.norm(h.double(), block.norm)
    q, k, v = (exact.linear(x, one).unflatten(-1, (-1, width)) for one in (block.q, block.k, block.v))
    q, k = exact.norm(q, block.q_norm), exact.norm(k, block.k_norm)
    if rotated:
        q, k = (rotary(one, angles.cos().double(), angles.sin().double()) for one in (q, k))
    assert_close(found, [one.flatten(2) for one in (q, k, v)])
    mlp = MlpBlock(norm(hidden), member(96, hidden), member(96, hidden), member(hidden, 96), "silu")
    exact = Exact((block.output, mlp.gate, mlp.up, mlp.down))
    added = h.double() + exact.linear(o.double(), block.output)
    assert_close([after_attention(h, o, block.output, mlp)], [exact.mlp(added, mlp)])


def test_what_is_kept() -> None:
    block = MlpBlock(norm(64), member(96, 64), member(96, 64), member(64, 96), "silu")
    h = torch.randn(1, 10, 64).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    held = {factor.data_ptr() for factor in factors((block.gate, block.up, block.down))}
    factors_made = (10 * 2 * 16 + 32) * 2 + (
        10 * 16 + 32
    ) * 2  # ranks of 4 take whole strips of 16, and end in a step of 32
    widths = {Recompute.ALL: [64], Recompute.CHEAP: [64, 96, 96], Recompute.NOTHING: [64, 64, 96, 96, 96]}
    for choice, expected in widths.items():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mlp_block(h, block, choice)
        found = sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in held)
        assert found == 10 * 2 * sum(expected) + (0 if choice is Recompute.ALL else factors_made)


def test_the_same_gradients_to_the_bit_whatever_is_kept() -> None:
    block = MlpBlock(norm(64), member(96, 64), member(96, 64), member(64, 96), "silu")
    h = torch.randn(2, 30, 64).bfloat16().requires_grad_()
    results = []
    for keep in Recompute:
        out = mlp_block(h, block, keep)
        leaves = [h, *factors((block.gate, block.up, block.down))]
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("keep", Recompute)
def test_a_backward_leaves_what_is_kept_as_it_was(keep: Recompute) -> None:
    """Gradients are made in the places of what is not needed any more."""
    mlp = MlpBlock(norm(32), member(64, 32), member(64, 32), member(32, 64), "silu")
    heads = (member(128, 32), member(64, 32), member(64, 32), member(32, 128))
    attended = AttentionBlock(norm(32), *heads, 32, 0.2, norm(32), norm(32))
    h = torch.randn(2, 5, 32).bfloat16().requires_grad_()
    out = mlp_block(attention_block(h, attended, None, None, keep), mlp, keep)
    inputs, grad = [h, *factors((*heads, mlp.gate, mlp.up, mlp.down))], torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    again = torch.autograd.grad(out, inputs, grad)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_what_is_prepared_once_follows_every_change() -> None:
    """Another shape, another level of keeping, factors and norms that moved: as if the block had never run."""
    block = MlpBlock(norm(64), member(96, 64), member(96, 64), member(64, 96), "silu")
    b, weight = block.up.b, block.norm.weight
    assert b is not None

    def run(tokens: int, keep: Recompute, used: MlpBlock) -> list[Tensor]:
        h = torch.linspace(-2, 2, tokens * 64).view(1, tokens, 64).bfloat16().requires_grad_()
        out = mlp_block(h, used, keep)
        return [out, *torch.autograd.grad(out, [h, *factors((used.gate, used.up, used.down))], torch.ones_like(out))]

    first = run(10, Recompute.NOTHING, block)
    for change in (
        lambda: None, lambda: setattr(b, "data", torch.full_like(b, 0.3)),
        lambda: setattr(weight, "data", weight.data * 2),
    ):  # fmt: skip
        change()
        for tokens, keep in (
            (10, Recompute.NOTHING),
            (7, Recompute.NOTHING),
            (10, Recompute.ALL),
            (10, Recompute.CHEAP),
        ):
            fresh = replace(block, **{name: replace(getattr(block, name)) for name in ("gate", "up", "down")})
            pairs = zip(run(tokens, keep, block), run(tokens, keep, fresh), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
    assert not torch.equal(first[0], run(10, Recompute.NOTHING, block)[0])


def test_a_converted_copy_of_a_weight_does_not_outlive_the_call() -> None:
    weights = [torch.randn(rows, columns).half() for rows, columns in ((613, 96), (613, 96), (96, 613))]
    gate, up, down = (AdaptedLinear(DenseWeight(weight)) for weight in weights)
    block = MlpBlock(norm(96), gate, up, down, "silu")
    mlp_block(torch.randn(1, 9, 96).bfloat16().requires_grad_(), block, Recompute.CHEAP).sum().backward()
    gc.collect()
    copies = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and sorted(t.shape) == [96, 613]]
    assert [t.dtype for t in copies if t.dtype != torch.float16] == []


def test_a_factor_changed_before_the_backward_is_an_error() -> None:
    block = MlpBlock(norm(64), member(96, 64), member(96, 64), member(64, 96), "silu")
    out = mlp_block(torch.randn(1, 10, 64).bfloat16().requires_grad_(), block, Recompute.CHEAP)
    assert block.down.a is not None
    with torch.no_grad():
        block.down.a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
