"""What stands before and behind attention, out of operations: numeric gradients, and the same out of float64 matrices.

It serves GPUs, where tests/cuda runs it; nothing in it asks where it runs.
"""

import pytest
import torch
from torch import Tensor

from entrenar.layers import adapted_composed, composed_blocks
from entrenar.layers.composed_blocks import after_attention, before_attention
from entrenar.ops.elementwise.rotary import rotary
from tests.support.blocks import Exact, assert_close, factors
from tests.support.composed_blocks import HEADS, HIDDEN, WIDTH, attention_block, mlp_block, rotation_of

RANKS = [(3, 3, 3, 3), (2, 0, 4, 0), (0, 0, 0, 0)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rotated", [0, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_before_attention(ranks: tuple[int, ...], norms: bool, rotated: int, dtype: torch.dtype) -> None:
    block, rotation = attention_block(ranks, norms), rotation_of(rotated, dtype)
    members = (block.q, block.k, block.v)
    h = torch.randn(2, 5, HIDDEN).to(dtype).requires_grad_()
    found = before_attention(h, block, rotation)
    exact, wide = Exact(members), h.detach().double().requires_grad_()
    x = exact.norm(wide, block.norm)
    q, k, v = (exact.linear(x, one).unflatten(-1, (-1, WIDTH)) for one in members)
    q, k = exact.norm(q, block.q_norm), exact.norm(k, block.k_norm)
    if rotation is not None:
        cos, sin = (angle.double() for angle in rotation)
        q, k = (rotary(one, cos, sin) for one in (q, k))
    expected = (wide, *(one.flatten(2) for one in (q, k, v)))
    assert_close(found, expected)
    grads = [torch.randn_like(one) for one in found]
    gradients = torch.autograd.grad(found, [h, *factors(members)], grads)
    wide_grads = [grad.double() for grad in grads]
    assert_close(gradients, torch.autograd.grad(expected, [wide, *exact.leaves], wide_grads))
    with torch.no_grad():
        for one, other in zip(before_attention(h, block, rotation), found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_after_attention(ranks: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    output, block = attention_block(ranks, norms=False).output, mlp_block(ranks, activation)
    members = (output, block.gate, block.up, block.down)
    h, attended = (torch.randn(2, 5, width).to(dtype).requires_grad_() for width in (HIDDEN, HEADS * WIDTH))
    found = after_attention(h, attended, output, block)
    exact = Exact(members)
    wide, wide_attended = (one.detach().double().requires_grad_() for one in (h, attended))
    expected = exact.mlp(wide + exact.linear(wide_attended, output), block)
    assert_close([found], [expected])
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, [h, attended, *factors(members)], grad)
    leaves = [wide, wide_attended, *exact.leaves]
    assert_close(gradients, torch.autograd.grad(expected, leaves, grad.double()))
    with torch.no_grad():
        assert torch.equal(after_attention(h, attended, output, block), found)


@pytest.mark.parametrize("norms", [False, True])
def test_numeric_gradients(norms: bool) -> None:
    block, mlp, rotation = attention_block(RANKS[0], norms), mlp_block(RANKS[0], "silu"), rotation_of(4, torch.float64)
    for one in (*factors((block.q, block.k, block.v, block.output)), *factors((mlp.gate, mlp.up, mlp.down))):
        one.data = one.data.double()
    h, attended = (torch.randn(2, 5, width).double().requires_grad_() for width in (HIDDEN, HEADS * WIDTH))
    before = factors((block.q, block.k, block.v))
    after = factors((block.output, mlp.gate, mlp.up, mlp.down))

    def layer(h: Tensor, attended: Tensor, *_: Tensor) -> Tensor:
        same, q, k, v = before_attention(h, block, rotation)
        return after_attention(same, attended + q, block.output, mlp).sum() + (k * v).sum()

    assert torch.autograd.gradcheck(layer, (h, attended, *before, *after), fast_mode=True)


def test_nothing_is_made_for_an_input_that_wants_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted_composed, "_transposed_product", lambda *_: 1 / 0)
    block = attention_block(RANKS[0], norms=False)
    members = (block.q, block.k, block.v)
    h = torch.randn(2, 5, HIDDEN)
    _, *found = before_attention(h, block, None)
    gradients = torch.autograd.grad(found, factors(members), [torch.ones_like(one) for one in found])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    h = torch.randn(1, 2, 4)
    assert not composed_blocks.serves(h)
    monkeypatch.setattr(composed_blocks, "_is_on_gpu", lambda _: True)
    assert composed_blocks.serves(h)
    assert not composed_blocks.serves(h[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not composed_blocks.serves(h)
