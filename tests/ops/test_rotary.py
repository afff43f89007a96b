"""Rotary embedding: against float64 and transformers' own, the transpose as gradient, any strides."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.elementwise.rotary import rotary
from tests.support.compare import assert_rounded_once, spacing
from tests.support.guards import assert_guard, guarded
from tests.support.samples import DTYPES, adversarial, awkward, gaussian, unaligned

NATIVE = [path for path in native.supported_paths() if path != "reference"]
Oracle = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# (B, T, H, D), R: whole pairs, odd widths, a part turned, none turned, halves wider than a piece of 256, one of each
SHAPES = [
    ((2, 5, 3, 64), 64), ((1, 7, 2, 128), 128), ((2, 3, 4, 6), 4), ((1, 2, 3, 80), 32), ((2, 1, 1, 5), 0),
    ((1, 2, 2, 1100), 1058), ((3, 4, 1, 2), 2), ((1, 1, 1, 34), 34),
    ((0, 4, 2, 8), 8), ((2, 0, 2, 8), 8), ((2, 3, 0, 8), 8),
]  # fmt: skip


def angles(batches: int, tokens: int, rotated: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Any numbers: the halves of cos differ, and cos² + sin² is not 1."""
    cos, sin = (gaussian(batches * tokens * rotated, dtype, seed).view(batches, tokens, rotated) for seed in (5, 6))
    return cos, sin


def exact_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Element by element from the definition, in float64."""
    out, half = x.double().clone(), cos.shape[-1] // 2
    c, s = cos.double()[:, :, None], sin.double()[:, :, None]
    first, second = x.double()[..., :half], x.double()[..., half : 2 * half]
    out[..., :half] = first * c[..., :half] - second * s[..., :half]
    out[..., half : 2 * half] = second * c[..., half:] + first * s[..., half:]
    return out


def magnitudes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two terms of each element, each without its sign."""
    half = sin.shape[-1] // 2
    signs = torch.ones(sin.shape[-1]).index_fill(0, torch.arange(half), -1.0)
    return exact_rotary(x.abs(), cos.abs(), sin.abs() * signs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cos_dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rotated"), SHAPES)
@pytest.mark.parametrize("shared", [True, False])
def test_forward_and_gradient_are_float64s_rounded_once(
    kernel_path: str, shape: tuple[int, ...], rotated: int, dtype: torch.dtype, cos_dtype: torch.dtype, shared: bool
) -> None:
    x, grad = (gaussian(torch.Size(shape).numel(), dtype, seed).view(shape) for seed in (1, 2))
    cos, sin = angles(1 if shared else shape[0], shape[1], rotated, cos_dtype)
    y = rotary(x.requires_grad_(), cos, sin)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_rounded_once(y, exact_rotary(x.detach(), cos, sin), 2, magnitudes(x.detach(), cos, sin))
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(exact_rotary(wide, cos, sin), wide, grad.double())
    (dx,) = torch.autograd.grad(y, x, grad)
    assert dx.is_contiguous()
    assert_rounded_once(dx, exact, 2, magnitudes(grad, cos, torch.cat(sin.chunk(2, dim=-1)[::-1], dim=-1)))


@pytest.mark.parametrize(("oracle", "rotated"), [(apply_rotary_pos_emb, 64), (apply_partial, 48)])
def test_transformers_function_on_its_own_layout(kernel_path: str, oracle: Oracle, rotated: int) -> None:
    """(B, H, T, D) tensors, read through a transpose."""
    q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
    phase = torch.rand(2, 9, rotated // 2) * 6
    cos, sin = (torch.cat((f(phase), f(phase)), dim=-1) for f in (torch.cos, torch.sin))
    for x, expected in zip((q, k), oracle(q, k, cos, sin), strict=True):
        assert torch.allclose(rotary(x.transpose(1, 2), cos, sin).transpose(1, 2), expected, atol=1e-6)


@pytest.mark.parametrize("path", NATIVE)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 3), half=st.integers(0, 70), rest=st.integers(0, 40),
    order=st.permutations([0, 1, 2]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape_and_strides_agree_with_the_reference(
    path: str, sizes: tuple[int, int, int], half: int, rest: int, order: list[int], dtype: torch.dtype
) -> None:
    width = 2 * half + rest
    x = gaussian(torch.Size(sizes).numel() * width, dtype).view(*(sizes[i] for i in order), width)
    x = x.permute(*(order.index(i) for i in range(3)), 3)
    cos, sin = angles(1, sizes[1], 2 * half, dtype)
    for transpose in (False, True):
        with native.using("reference"):
            expected = torch.ops.entrenar.rotary(x, cos, sin, transpose)
        with native.using(path):
            found = torch.ops.entrenar.rotary(x, cos, sin, transpose)
        assert found.shape == x.shape
        assert torch.allclose(found.float(), expected.float(), rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_memory_changes_no_bit(path: str, dtype: torch.dtype) -> None:
    x = gaussian(2 * 3 * 4 * 40, dtype).view(2, 3, 4, 40)
    cos, sin = angles(2, 3, 36, dtype)
    with native.using(path):
        expected = rotary(x, cos, sin)
        for other in awkward(x):
            assert torch.equal(rotary(other, unaligned(cos), sin), expected)
        assert torch.equal(rotary(x[:1].expand(2, 3, 4, 40), cos[:1], sin[:1]), expected[:1].expand(2, 3, 4, 40))
        assert torch.equal(rotary(x[:, 1:2, 2:], cos[:, 1:2], sin[:, 1:2]), expected[:, 1:2, 2:])


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(adversarial(torch.float32)))
def test_hard_values_come_out_as_in_the_reference(path: str, dtype: torch.dtype, name: str) -> None:
    x = adversarial(dtype)[name].view(1, 2, 1, 100).clone()
    x[0, 1, 0, 99] = float("nan")
    cos, sin = (angle.clamp(-0.5, 0.5) for angle in angles(1, 2, 100, dtype))  # no overflow, which fusing puts off
    with native.using("reference"):
        expected = rotary(x, cos, sin)
    with native.using(path):
        found = rotary(x, cos, sin)
    assert torch.equal(found.isnan(), expected.isnan())
    slack = magnitudes(x, cos, sin).nan_to_num() * 2.0**-22 + spacing(expected.double().nan_to_num(), dtype)
    assert ((found.double() - expected.double()).abs() <= slack).logical_or(expected.isnan()).all()


def test_gradients_of_first_and_second_order_are_numeric_ones() -> None:
    x = torch.randn(2, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(1, 3, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x)
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, cos, sin), x)


def test_nothing_is_saved_but_the_angles() -> None:
    saved: list[Tensor] = []
    cos, sin = angles(1, 3, 8, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(torch.randn(2, 3, 2, 8, requires_grad=True), cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize("transpose", [False, True])
def test_opcheck(kernel_path: str, transpose: bool) -> None:
    x = torch.randn(2, 4, 3, 40).transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.entrenar.rotary, (x, *angles(2, 3, 36, torch.float32), transpose))


@pytest.mark.parametrize(
    "shape", [(1, 3, 7), (1, 3, 10), (1, 2, 8), (3, 3, 8), (3, 8)], ids=["odd", "wide", "tokens", "batch", "flat"]
)
def test_angles_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    angle = torch.zeros(shape)
    with pytest.raises(InputError, match=r"R even and at most D"):
        rotary(torch.zeros(2, 3, 4, 8), angle, angle)


def test_angles_of_two_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match="of one dtype"):
        rotary(torch.zeros(2, 3, 4, 8), torch.zeros(1, 3, 8), torch.zeros(1, 3, 8).half())


ROTARY = native.Function("rotary")


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("width", [2, 15, 33, 64, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_writes_outside_its_buffer(path: str, width: int, dtype: torch.dtype) -> None:
    x, rotated, number = gaussian(6 * width, dtype), width // 2 * 2, native.DTYPES[dtype]
    cos, sin = angles(1, 2, rotated, dtype)
    out, raw = guarded(6 * width, dtype)
    with native.using(path):
        ROTARY(x, cos, sin, out, 1, 2, 3, width, rotated, 6 * width, 3 * width, width, 1, number, number, 0, 2)
    assert_guard(raw)


# batch, tokens, heads, width, rotated, three strides, batches of cos; the buffers are for 2, 3, 4, 8, 8
BAD = [
    (3, 3, 4, 8, 8, 96, 32, 8, 1), (2, 4, 4, 8, 8, 96, 32, 8, 1), (2, 3, 5, 8, 8, 96, 32, 8, 1),
    (2, 3, 4, 9, 8, 96, 32, 8, 1), (2, 3, 4, 8, 10, 96, 32, 8, 1), (2, 3, 4, 8, 7, 96, 32, 8, 1),
    (2, 3, 4, 8, 8, 97, 32, 8, 1), (2, 3, 4, 8, 8, 96, 33, 8, 1), (2, 3, 4, 8, 8, 96, 32, 9, 1),
    (2, 3, 4, 8, 8, -96, 32, 8, 1), (2, 3, 4, 8, 8, 2**62, 32, 8, 1), (2, 3, 4, 8, 8, 2**63 - 1, 2**63 - 1, 8, 1),
    (2, 3, 4, 8, 8, 96, 32, 8, 2), (2, 3, 4, 8, 8, 96, 32, 8, 3), (-2, 3, 4, 8, 8, 96, 32, 8, 1),
    (2, 2**62, 4, 8, 8, 96, 32, 8, 1), (2, 3, 4, 8, -2, 96, 32, 8, 1),
]  # fmt: skip


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
@pytest.mark.parametrize("sizes", BAD)
def test_sizes_and_strides_beyond_the_buffers_are_errors(sizes: tuple[int, ...]) -> None:
    x, cos = torch.zeros(2, 3, 4, 8), torch.zeros(1, 3, 8)
    ROTARY(x, cos, cos, torch.zeros(192), 2, 3, 4, 8, 8, 96, 32, 8, 1, 0, 0, 0, 2)
    with pytest.raises(InputError, match="refused its arguments"):
        ROTARY(x, cos, cos, torch.zeros(192), *sizes, 0, 0, 0, 2)
