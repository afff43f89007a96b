"""The RMS norm: against float64 and transformers' own, its gradients, hard values, awkward memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.elementwise import rms_norm as module
from entrenar.ops.elementwise.rms_norm import rms_norm
from tests.support.compare import assert_rounded_once
from tests.support.guards import assert_guard, guarded
from tests.support.samples import DTYPES, adversarial, awkward, gaussian, unaligned

NATIVE = [path for path in native.supported_paths() if path != "reference"]
SHAPES = [(0, 8), (1, 1), (3, 7), (5, 31), (4, 33), (2, 3, 64), (7, 577), (300, 40), (3, 2049), (64,)]
OPS = torch.ops.entrenar


def exact_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    count = torch.Size(shape).numel()
    x, grad = (gaussian(count, dtype, seed).view(shape) for seed in (1, 2))
    return x, gaussian(shape[-1], weight_dtype, 3), grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_float64s_rounded_once(
    kernel_path: str, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight, _ = inputs(shape, dtype, weight_dtype)
    for offset in (0.0, 1.0):
        y = rms_norm(x, weight, 1e-5, offset)
        assert y.dtype == dtype
        assert y.is_contiguous()
        scale = exact_norm(x, weight.abs(), 1e-5, offset).abs()  # weight + 1 may cancel
        assert_rounded_once(y, exact_norm(x, weight, 1e-5, offset), 16, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_float64s_rounded_once(
    kernel_path: str, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight, grad = inputs(shape, dtype, weight_dtype)
    eps = 0.1  # so that dx does not vanish for rows of one
    found = torch.autograd.grad(rms_norm(x.requires_grad_(), weight.requires_grad_(), eps, 1.0), (x, weight), grad)
    wide, factor = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(exact_norm(wide, factor, eps, 1.0), (wide, factor), grad.double())
    r = 1 / (wide.detach().square().mean(-1, keepdim=True) + eps).sqrt()
    h = (grad.double() * (factor.detach().abs() + 1)).abs()
    terms = r * h + wide.detach().abs() * r**3 * (h * wide.detach().abs()).mean(-1, keepdim=True)
    assert_rounded_once(found[0], exact[0], 16, terms)
    terms = (grad.double() * wide.detach() * r).abs().view(-1, shape[-1]).sum(0)
    assert_rounded_once(found[1], exact[1], 16, terms)


@pytest.mark.parametrize(("oracle", "offset"), [(LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)])
def test_transformers_norms_in_float32(kernel_path: str, oracle: type[torch.nn.Module], offset: float) -> None:
    norm = oracle(96, eps=1e-6)
    assert isinstance(norm.weight, torch.nn.Parameter)
    torch.nn.init.normal_(norm.weight)
    x, grad = torch.randn(2, 5, 96, requires_grad=True), torch.randn(2, 5, 96)
    y = rms_norm(x, norm.weight, 1e-6, offset)
    assert torch.allclose(y, norm(x), rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(y, (x, norm.weight), grad)
    for one, other in zip(found, torch.autograd.grad(norm(x), (x, norm.weight), grad), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", NATIVE)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_any_shape_agrees_with_the_reference(path: str, rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    x, grad = (gaussian(rows * columns, dtype, seed + i).view(rows, columns) for i in (0, 1000))
    weight = gaussian(columns, torch.float32, seed + 2000)
    results = {}
    for name in ("reference", path):
        with native.using(name):
            y = OPS.rms_norm(x, weight, 1e-5, 1.0)
            dx = OPS.rms_norm_backward(grad, x, weight, 1e-5, 1.0, None)
            results[name] = [y, dx, OPS.rms_norm_backward_weight(grad, x, weight, 1e-5)]
    step = 2 * torch.finfo(dtype).eps
    for found, expected in zip(results[path], results["reference"], strict=True):
        assert torch.allclose(found.float(), expected.float(), rtol=step, atol=1e-5 * rows**0.5 + step / 100)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*adversarial(torch.float32), "nan", "inf"])
def test_hard_values_come_out_as_in_the_reference(path: str, dtype: torch.dtype, name: str) -> None:
    x = adversarial(dtype).get(name, gaussian(200, dtype)).view(2, 100).clone()
    if name in ("nan", "inf"):
        x[1, 7] = float(name)
    weight, grad = gaussian(100, dtype), gaussian(200, dtype).view(2, 100)
    results = []
    for each in ("reference", path):
        with native.using(each):
            results.append(
                [OPS.rms_norm(x, weight, 1e-6, 0.0), OPS.rms_norm_backward(grad, x, weight, 1e-6, 0.0, None)]
            )
    for expected, found in zip(*results, strict=True):
        tolerance = 2 * torch.finfo(dtype).eps
        largest = expected[expected.isfinite()].abs().max() if expected.isfinite().any() else 0
        assert torch.allclose(found, expected, rtol=tolerance, atol=float(largest) * 1e-6, equal_nan=True)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_memory_changes_no_bit(path: str, dtype: torch.dtype) -> None:
    x, weight, grad = inputs((9, 77), dtype, dtype)
    with native.using(path):
        y, dx = rms_norm(x, weight, 1e-6), OPS.rms_norm_backward(grad, x, weight, 1e-6, 0.0, None)
        for x2, grad2 in zip(awkward(x), awkward(grad), strict=True):
            assert torch.equal(rms_norm(x2, unaligned(weight), 1e-6), y)
            assert torch.equal(OPS.rms_norm_backward(grad2, x2, weight, 1e-6, 0.0, None), dx)


def test_gradients_are_the_numeric_ones() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for offset in (0.0, 1.0):
        assert torch.autograd.gradcheck(lambda x, w, offset=offset: rms_norm(x, w, 1e-3, offset), (x, weight))


def test_a_frozen_weights_gradient_is_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("the native library is not built")

    def refuse(*_: object) -> None:
        raise AssertionError("the weight's gradient was computed")

    monkeypatch.setattr(module, "_weight", refuse)
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None


def test_nothing_is_saved_but_the_input_and_the_weight() -> None:
    saved: list[Tensor] = []
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-6)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel_path: str, dtype: torch.dtype) -> None:
    x, weight, grad = inputs((4, 40), dtype, torch.float32)
    torch.library.opcheck(OPS.rms_norm, (x.requires_grad_(), weight.requires_grad_(), 1e-6, 1.0))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(OPS.rms_norm_backward, (grad, x, weight, 1e-6, 1.0, grad))
    torch.library.opcheck(OPS.rms_norm_backward_weight, (grad, x, weight, 1e-6))


def test_a_weight_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"weight is \[7\], its input \[2, 8\]"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6)


FORWARD = native.Function("rms_norm")
BACKWARD = native.Function("rms_norm_backward")
WEIGHT = native.Function("rms_norm_backward_weight")


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("columns", [1, 15, 31, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_writes_outside_its_buffers(path: str, columns: int, dtype: torch.dtype) -> None:
    x, number = gaussian(3 * columns, dtype), native.DTYPES[dtype]
    (out, out_raw), (dweight, dweight_raw) = guarded(3 * columns, dtype), guarded(columns, dtype)
    with native.using(path):
        FORWARD(x, x[:columns], out, 3, columns, 1e-6, 0.0, number, number, 2)
        BACKWARD(x, x, x[:columns], None, out, 3, columns, 1e-6, 0.0, number, number, 2)
        WEIGHT(x, x, dweight, 3, columns, 1e-6, number, number, 2)
    assert_guard(out_raw)
    assert_guard(dweight_raw)


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
@pytest.mark.parametrize(("rows", "columns"), [(-1, 8), (8, -1), (2**62, 4), (9, 8), (8, 9), (-(2**63), 2**63 - 1)])
def test_sizes_beyond_the_buffers_are_errors(rows: int, columns: int) -> None:
    x, weight = torch.zeros(8, 8), torch.zeros(8)
    for call in (
        lambda: FORWARD(x, weight, x, rows, columns, 1e-6, 0.0, 0, 0, 2),
        lambda: BACKWARD(x, x, weight, None, x, rows, columns, 1e-6, 0.0, 0, 0, 2),
        lambda: WEIGHT(x, x, weight, rows, columns, 1e-6, 0, 0, 2),
    ):
        with pytest.raises(InputError, match="refused its arguments"):
            call()


@pytest.mark.parametrize("path", NATIVE)
def test_the_number_of_threads_changes_no_bit(path: str) -> None:
    x, weight, grad = inputs((100, 1000), torch.float32, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with native.using(path):
                made = OPS.rms_norm(x, weight, 1e-6, 0.0), OPS.rms_norm_backward_weight(grad, x, weight, 1e-6)
                found.append((*made, OPS.rms_norm_backward(grad, x, weight, 1e-6, 0.0, None)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
