"""Gated activations: against float64 and torch's own activations, their gradients, hard values, awkward memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.elementwise.gated_activation import KINDS, gated_activation, gated_activation_backward
from tests.support.compare import assert_rounded_once
from tests.support.guards import assert_guard, guarded
from tests.support.samples import DTYPES, adversarial, awkward, gaussian

NATIVE = [path for path in native.supported_paths() if path != "reference"]
COUNTS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 129, 1000, 40_001)
OPS = torch.ops.entrenar
TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def exact_activation(x: Tensor, kind: str) -> Tensor:
    """In float64, without torch's cancellation in 1 + erf and 1 + tanh."""
    x = x.double()
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "gelu":
        return x * torch.special.erfc(x * -(0.5**0.5)) / 2
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def exact_slope(x: Tensor, kind: str) -> Tensor:
    wide = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(exact_activation(wide, kind).sum(), wide)
    return slope


def samples(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gates over the activations' slopes and their tails as long as e^−v is a float32; up and the gradient."""
    spread = torch.empty(count).uniform_(-9, 15, generator=torch.Generator().manual_seed(0))
    gate = torch.where(gaussian(count, seed=1) > 0, spread, gaussian(count, seed=2)).to(dtype)
    return gate, gaussian(count, dtype, 3), gaussian(count, dtype, 4)


def slack(x: Tensor, kind: str, path: str) -> Tensor:
    """Units of 2⁻²⁴ for the float32 arithmetic: rounding the argument v of e^v costs |v| of them."""
    wide = x.double().abs()
    if kind == "gelu_tanh":
        return 12 + 8 * (wide + 0.044715 * wide**3)
    if kind == "gelu" and path == "reference":
        return 12 + 2 * wide.square()
    return torch.full_like(wide, 12)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_forward_and_gradients_are_float64s_rounded_once(
    kernel_path: str, count: int, dtype: torch.dtype, kind: str
) -> None:
    gate, up, grad = samples(count, dtype)
    y = gated_activation(gate.requires_grad_(), up.requires_grad_(), kind)
    dgate, dup = torch.autograd.grad(y, (gate, up), grad)
    gate, up = gate.detach(), up.detach()
    assert y.dtype == dgate.dtype == dup.dtype == dtype
    activation, units = exact_activation(gate, kind), slack(gate, kind, kernel_path)
    assert_rounded_once(y, activation * up.double(), units)
    assert_rounded_once(dup, activation * grad.double(), units)
    upstream, slope = grad.double() * up.double(), exact_slope(gate, kind)
    factor = torch.where(gate == 0, 0.5, activation / gate.double())  # the slope is this and a term that may cancel it
    assert_rounded_once(dgate, upstream * slope, units, upstream.abs() * (factor + (slope - factor).abs()))


@pytest.mark.parametrize("kind", list(KINDS))
def test_torchs_activation_and_its_gradient(kernel_path: str, kind: str) -> None:
    gate, up, grad = (tensor.requires_grad_() for tensor in samples(1000, torch.float32))
    y, expected = gated_activation(gate, up, kind), TORCH[kind](gate) * up
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    for found, other in zip(
        torch.autograd.grad(y, (gate, up), grad), torch.autograd.grad(expected, (gate, up), grad), strict=True
    ):
        assert torch.allclose(found, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", NATIVE)
@given(
    count=st.integers(1, 3000), kind=st.sampled_from(list(KINDS)), dtype=st.sampled_from(DTYPES),
    size=st.floats(1e-3, 30), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_count_agrees_with_the_reference(
    path: str, count: int, kind: str, dtype: torch.dtype, size: float, seed: int
) -> None:
    gate = (gaussian(count, seed=seed) * size).to(dtype)
    up, grad = gaussian(count, dtype, seed + 1), gaussian(count, dtype, seed + 2)
    results = []
    for name in ("reference", path):
        with native.using(name):
            results.append([gated_activation(gate, up, kind), *gated_activation_backward(grad, gate, up, kind)])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*adversarial(torch.float32), "NaN and infinities"])
def test_hard_values_come_out_as_in_the_reference(path: str, kind: str, dtype: torch.dtype, name: str) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).repeat(50).to(dtype)
    gate = (adversarial(dtype) | {"NaN and infinities": special})[name]
    up, grad = gaussian(200, dtype, 1), gaussian(200, dtype, 2)
    results = []
    for each in ("reference", path):
        with native.using(each):
            results.append([gated_activation(gate, up, kind), *gated_activation_backward(grad, gate, up, kind)])
    cancelled = torch.zeros(200).double(), 4e-6 * (grad.double() * up.double()).abs(), torch.zeros(200).double()
    for expected, found, more in zip(*results, cancelled, strict=True):
        # The reference's error grows with x² (see `slack`), and its σ is 0 where e^−v overflows.
        allowed = (2 * torch.finfo(dtype).eps + 3e-5) * expected.double().abs() + more + 1e-36
        # At an infinity the formulas may have NaN where a kernel has the limit.
        same = (found == expected) | (expected.isnan() & (found.isnan() | gate.isinf()))
        assert (((found.double() - expected.double()).abs() <= allowed) | same).all()


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_huge_gate_is_the_identity_or_zero(path: str, kind: str) -> None:
    gate = torch.tensor([1e30, -1e30, 3e38, -3e38])
    one = torch.ones(4)
    with native.using(path):
        y, (dgate, dup) = gated_activation(gate, one, kind), gated_activation_backward(one, gate, one, kind)
    for found in (y, dup):
        assert torch.allclose(found, gate.clamp(min=0), rtol=2.0**-22, atol=0)
    assert torch.allclose(dgate, torch.tensor([1.0, 0.0, 1.0, 0.0]), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_memory_changes_no_bit(path: str, dtype: torch.dtype) -> None:
    gate, up, grad = (tensor.view(9, 77) for tensor in samples(693, dtype))
    with native.using(path):
        expected = [gated_activation(gate, up, "silu"), *gated_activation_backward(grad, gate, up, "silu")]
        for gate2, up2, grad2 in zip(awkward(gate), awkward(up), awkward(grad), strict=True):
            found = [gated_activation(gate2, up2, "silu"), *gated_activation_backward(grad2, gate2, up2, "silu")]
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_the_numeric_ones(kind: str) -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda gate, up: gated_activation(gate * 3, up, kind), (gate, up))


def test_nothing_is_saved_but_gate_and_up_and_without_gradients_nothing_at_all() -> None:
    saved: list[Tensor] = []
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not gated_activation(gate, up, "silu").requires_grad
        assert not saved
        gated_activation(gate, up, "silu")
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("kind", list(KINDS))
def test_opcheck(kernel_path: str, kind: str) -> None:
    gate, up, grad = (tensor.view(2, 50) for tensor in samples(100, torch.bfloat16))
    torch.library.opcheck(OPS.gated_activation_backward, (grad, gate, up, kind))
    torch.library.opcheck(OPS.gated_activation, (gate.requires_grad_(), up.requires_grad_(), kind))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="unknown activation 'relu': the gated ones are silu, gelu, gelu_tanh"):
        gated_activation(torch.zeros(2), torch.zeros(2), "relu")
    for up in (torch.zeros(3), torch.zeros(2).half()):
        with pytest.raises(InputError, match="one shape and dtype"):
            gated_activation(torch.zeros(2), up, "silu")


FORWARD = native.Function("gated_activation")
BACKWARD = native.Function("gated_activation_backward")


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("count", [1, 15, 31, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_writes_outside_its_buffers(path: str, count: int, dtype: torch.dtype) -> None:
    x, number = gaussian(count, dtype), native.DTYPES[dtype]
    (first, first_raw), (second, second_raw) = guarded(count, dtype), guarded(count, dtype)
    with native.using(path):
        for kind in KINDS.values():
            FORWARD(x, x, first, count, kind, number, 2)
            BACKWARD(x, x, x, first, second, count, kind, number, 2)
    assert_guard(first_raw)
    assert_guard(second_raw)


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
@pytest.mark.parametrize(
    ("count", "kind", "dtype"), [(-1, 0, 0), (9, 0, 0), (2**62, 0, 0), (8, 3, 0), (8, -1, 0), (8, 0, 3)]
)
def test_counts_and_kinds_that_are_wrong_are_errors(count: int, kind: int, dtype: int) -> None:
    x = torch.zeros(8)
    for call in (
        lambda: FORWARD(x, x, x, count, kind, dtype, 2),
        lambda: BACKWARD(x, x, x, x, x, count, kind, dtype, 2),
    ):
        with pytest.raises(InputError, match="refused its arguments"):
            call()
