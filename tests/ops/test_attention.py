"""Causal attention: against float64 and numeric gradients, on every path; documents and windows; who may see whom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.ops.attention import attention_mask, causal_attention
from tests.support.attention import exactly

# (B, T, H, G, D): one token; less, equal and more than a block of 32 and of 128; grouped and single heads
SHAPES = [
    (1, 1, 1, 1, 32),
    (2, 31, 3, 1, 64),
    (1, 128, 4, 2, 32),
    (2, 257, 6, 3, 96),
    (1, 513, 2, 2, 64),
    (1, 70, 8, 1, 256),
]


def tensors(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, kv_heads, width = shape
    q, k, v = (torch.randn(batch, tokens, n, width).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads))
    return q, k, v


def documents(batch: int, tokens: int, window: int = 0) -> Tensor:
    """Starts of some documents a row, with a window of so many tokens."""
    index = torch.arange(tokens)
    cuts = torch.rand(batch, tokens) < 0.1
    starts = torch.where(cuts, index, 0).cummax(dim=1).values
    return (starts.maximum(index - window + 1) if window else starts).int()


def trees(batch: int, tokens: int, window: int = 0) -> tuple[Tensor, Tensor]:
    """Starts with gaps of documents with branches, and which keys each token sees, said token by token."""
    starts, seen = (
        torch.zeros(batch, tokens, 3, dtype=torch.int32),
        torch.zeros(batch, tokens, tokens, dtype=torch.bool),
    )
    for row in range(batch):
        trunk, run, shared = 0, 0, 0  # where they begin, and tokens of the trunk that the run follows
        trunk_size = tokens
        for token in range(tokens):
            if token > trunk + 2 and torch.rand(()) < 0.1:
                if torch.rand(()) < 0.3:
                    trunk, run, shared, trunk_size = token, token, 0, tokens
                else:
                    trunk_size = min(trunk_size, token - trunk)
                    run, shared = token, int(torch.randint(1, trunk_size + 1, ()))
            place = shared + token - run
            keys = [(key, key - trunk) for key in range(trunk, trunk + shared)]
            keys += [(key, shared + key - run) for key in range(run, token + 1)]
            keys = [key for key, at in keys if not window or at > place - window]
            seen[row, token, keys] = True
            in_trunk = [key for key in keys if key < run]
            gap = (in_trunk[-1] + 1, run) if in_trunk and run > trunk else (0, 0)
            starts[row, token] = torch.tensor([keys[0], *gap])
    return starts, seen


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 0, 20])
def test_values_and_gradients(
    kernel_path: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int], window: int | None
) -> None:
    starts = None if window is None else documents(*shape[:2], window)
    q, k, v = tensors(shape, dtype)
    out = causal_attention(q, k, v, 0.2, starts)
    grad = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (q, k, v), grad))
    a, b, c = (tensor.detach().double().requires_grad_() for tensor in (q, k, v))
    exact = exactly(a, b, c, 0.2, starts)
    expected = (exact, *torch.autograd.grad(exact, (a, b, c), grad.double()))
    for one, other in zip(found, expected, strict=True):
        # Of one token alone the gradients of q and k are 0: what is left is rounding, relative to nothing.
        bound = {torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
        assert relative_error(one, other) < bound or (one.double() - other).abs().max() < bound * grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 900, 2, 1, 32)])
@pytest.mark.parametrize("window", [0, 20])
def test_trees(kernel_path: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int], window: int) -> None:
    starts, seen = trees(*shape[:2], window)
    assert torch.equal(attention_mask(starts), seen)
    q, k, v = tensors(shape, dtype)
    out = causal_attention(q, k, v, 0.2, starts)
    grad = torch.randn_like(out)
    results = (out, *torch.autograd.grad(out, (q, k, v), grad))
    a, b, c = (tensor.detach().double().requires_grad_() for tensor in (q, k, v))
    exact = exactly(a, b, c, 0.2, starts)
    expected = (exact, *torch.autograd.grad(exact, (a, b, c), grad.double()))
    for one, other in zip(results, expected, strict=True):
        bound = {torch.bfloat16: 8e-3, torch.float32: 1e-5}[dtype]
        assert relative_error(one, other) < bound or (one.double() - other).abs().max() < bound * grad.abs().max()


def test_a_gap_that_hides_a_token_from_itself_is_refused() -> None:
    q, k, v = tensors((1, 4, 1, 1, 32), torch.bfloat16)
    for gap in ([2, 1], [-1, 0], [0, 4]):
        starts = torch.tensor([[[0, 0, 0]] * 3 + [[0, *gap]]], dtype=torch.int32)
        with pytest.raises(InputError, match="refused"):
            causal_attention(q, k, v, 0.2, starts)


@settings(max_examples=15, deadline=None)
@given(tokens=st.integers(1, 300), group=st.integers(1, 3), seed=st.integers(0, 5))
def test_any_number_of_tokens(kernel_path: str, tokens: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = tensors((1, tokens, 2 * group, 2, 32), torch.bfloat16)
    starts = documents(1, tokens)
    assert relative_error(causal_attention(q, k, v, 0.3, starts), exactly(q, k, v, 0.3, starts)) < 8e-3


def test_numeric_gradients() -> None:
    q, k, v = tensors((1, 7, 4, 2, 32), torch.float64)
    starts = documents(1, 7)
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, 0.4, starts), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(kernel_path: str, dtype: torch.dtype) -> None:
    q, k, v = tensors((2, 40, 4, 2, 32), dtype)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.entrenar.causal_attention, (q, k, v, 0.3, documents(2, 40)), test_utils=tests)


def test_what_a_token_may_not_see_does_not_reach_it(kernel_path: str) -> None:
    q, k, v = (tensor.detach() for tensor in tensors((1, 100, 2, 1, 32), torch.bfloat16))
    starts = torch.tensor([[0] * 37 + [37] * 63], dtype=torch.int32)
    before = causal_attention(q, k, v, 0.3, starts)
    k[:, 37:], v[:, 37:] = k[:, 37:] * 30, v[:, 37:] - 50  # the second document
    assert torch.equal(causal_attention(q, k, v, 0.3, starts)[:, :37], before[:, :37])


def test_any_strides(kernel_path: str) -> None:
    q, k, v = (tensor.detach() for tensor in tensors((2, 50, 4, 2, 32), torch.bfloat16))
    expected = causal_attention(q, k, v, 0.3)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def doubled(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    for strided in (turned, doubled):
        found = causal_attention(strided(q), strided(k), strided(v), 0.3)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)  # torch's own depends on the strides


def test_scores_that_overflow_exp_and_rows_that_differ_by_much(kernel_path: str) -> None:
    q, k, v = (tensor.detach() for tensor in tensors((1, 300, 2, 1, 32), torch.bfloat16))
    assert relative_error(causal_attention(q * 50, k * 50, v, 1.0), exactly(q * 50, k * 50, v, 1.0, None)) < 8e-3


def test_one_thread_and_many_give_the_same_bytes(kernel_path: str) -> None:
    if kernel_path == "reference":
        pytest.skip("torch's own attention makes no such promise")
    q, k, v = tensors((1, 200, 4, 2, 32), torch.bfloat16)
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            out = causal_attention(q, k, v, 0.3)
            found.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("starts", [[0, 2, 1], [0, 0, 3], [-1, 0, 0]])
def test_starts_that_fall_or_lie_ahead_are_refused_by_the_native_kernels(native_path: str, starts: list[int]) -> None:
    q, k, v = tensors((1, 3, 1, 1, 32), torch.bfloat16)
    with pytest.raises(InputError, match="out of range"):
        causal_attention(q, k, v, 0.3, torch.tensor([starts], dtype=torch.int32))
