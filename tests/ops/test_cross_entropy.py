"""Cross-entropy over rows: against torch's in float64, the gradient in place of the logits, hard logits, bad labels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.cross_entropy.operation import cross_entropy_losses, cross_entropy_rows
from tests.support.compare import assert_rounded_once
from tests.support.guards import assert_guard, guarded
from tests.support.samples import DTYPES, adversarial, awkward, gaussian

NATIVE = [path for path in native.supported_paths() if path != "reference"]
SHAPES = [(0, 5), (1, 1), (3, 2), (5, 31), (4, 32), (2, 33), (3, 577), (2, 2047), (3, 2048), (2, 2049), (2, 5000)]
INFINITY, NAN = float("inf"), float("nan")
OPS = torch.ops.entrenar


def exact(logits: Tensor, labels: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their sum by torch's autograd, in float64."""
    wide = logits.double().requires_grad_()
    z = torch.tanh(wide / softcap) * softcap if softcap else wide
    losses = F.cross_entropy(z, labels, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), wide)
    return losses.detach(), gradient


def terms(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    """The gradient without its cancellations, p − 1 and 1 − tanh²: float32 leaves units of 2⁻²⁴ of these."""
    wide = logits.double()
    probabilities = torch.softmax(torch.tanh(wide / softcap) * softcap if softcap else wide, dim=1)
    return probabilities + F.one_hot(labels, logits.shape[1])


def inputs(rows: int, columns: int, dtype: torch.dtype, size: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    logits = (gaussian(rows * columns, seed=seed) * size).to(dtype).view(rows, columns)
    labels = torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(seed))
    return logits, labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [0.0, 5.0, 30.0])
def test_losses_and_gradient_are_float64s_rounded_once(
    kernel_path: str, shape: tuple[int, int], dtype: torch.dtype, softcap: float
) -> None:
    logits, labels = inputs(*shape, dtype)
    kept = logits.clone()
    expected, gradient = exact(logits, labels, softcap)
    losses = cross_entropy_losses(logits, labels, softcap)
    assert torch.equal(logits, kept)
    assert losses.dtype == torch.float32
    largest = 16.0 + softcap  # e^z is as far off as z
    assert_rounded_once(losses, expected, 8, expected + largest)
    assert torch.equal(cross_entropy_rows(logits, labels, softcap), losses)
    assert_rounded_once(logits, gradient, 16 + 8 * largest, terms(kept, labels, softcap))


def test_small_logits_keep_their_differences_under_a_softcap(kernel_path: str) -> None:
    """30 · tanh(x / 30) of logits near 0, where a tanh by 1 − 2 / (e^2u + 1) would cancel."""
    logits, labels = inputs(4, 1000, torch.float32, size=1e-4)
    kept = logits.clone()
    expected, gradient = exact(logits, labels, 30.0)
    losses = cross_entropy_rows(logits, labels, 30.0)
    assert_rounded_once(losses, expected, 4)
    assert_rounded_once(logits, gradient, 16, terms(kept, labels, 30.0))


@pytest.mark.parametrize("path", NATIVE)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 5000), size=st.floats(0.01, 50), seed=st.integers(0, 999),
    dtype=st.sampled_from(DTYPES), softcap=st.sampled_from([0.0, 30.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape_agrees_with_the_reference(
    path: str, rows: int, columns: int, size: float, seed: int, dtype: torch.dtype, softcap: float
) -> None:
    logits, labels = inputs(rows, columns, dtype, size, seed)
    results = []
    for name in ("reference", path):
        with native.using(name):
            gradient = logits.clone()
            results.append((cross_entropy_rows(gradient, labels, softcap), gradient.float()))
    (expected, expected_gradient), (losses, gradient) = results
    assert torch.allclose(losses, expected, rtol=1e-5, atol=2e-5)
    assert torch.allclose(gradient, expected_gradient, rtol=2 * torch.finfo(dtype).eps + 1e-4, atol=1e-6)


def row_of(columns: int, places: dict[int, float], rest: float = 0.0) -> Tensor:
    row = torch.full((1, columns), rest)
    for place, value in places.items():
        row[0, place] = value
    return row


LN2 = 0.6931472
# A row, its label, its loss, and some elements of the gradient; tiles are of 2048 logits.
HARD = {
    "a huge logit": (row_of(5000, {4000: 1e30}), 4000, 0.0, {4000: 0.0, 0: 0.0, 2048: 0.0}),
    "a huge logit that is not the label": (row_of(5000, {4000: 1e30}), 0, 1e30, {4000: 1.0, 0: -1.0}),
    "hugely negative ones": (row_of(5000, {3000: -1e30}, -3e38), 3000, 0.0, {3000: 0.0, 1: 0.0}),
    "the whole range": (row_of(70, {3: 3e38, 4: -3e38}), 3, 0.0, {3: 0.0, 4: 0.0}),
    "a first tile of −∞": (row_of(2050, {2048: 0.0, 2049: 0.0}, -INFINITY), 2048, LN2, {2048: -0.5, 2049: 0.5, 0: 0.0}),
    "a last tile of −∞": (row_of(4096, {7: 0.0, 9: 0.0}, -INFINITY), 7, LN2, {7: -0.5, 9: 0.5, 4095: 0.0}),
    "a label of −∞": (row_of(40, {3: -INFINITY}), 3, INFINITY, {3: -1.0}),
    "growing by tiles": (
        row_of(6000, {10: 200.0, 3000: 400.0, 5000: 401.0}),
        3000,
        1.3132617,
        {10: 0, 3000: -0.7310586},
    ),
}


@pytest.mark.parametrize("name", list(HARD))
def test_hard_rows_have_their_closed_form(kernel_path: str, name: str) -> None:
    logits, label, loss, gradient = HARD[name]
    logits, labels = logits.clone(), torch.tensor([label])
    assert torch.allclose(cross_entropy_losses(logits, labels), torch.tensor([loss]), rtol=1e-6)
    assert torch.allclose(cross_entropy_rows(logits, labels), torch.tensor([loss]), rtol=1e-6)
    for place, value in gradient.items():
        assert logits[0, place].item() == pytest.approx(value, rel=1e-6, abs=0)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 1, 31, 2500, 2559])
def test_a_nan_makes_its_row_nan_and_no_other(kernel_path: str, place: int, dtype: torch.dtype, softcap: float) -> None:
    logits, labels = inputs(3, 2560, dtype)
    logits[1, place] = NAN
    assert cross_entropy_losses(logits, labels, softcap).isnan().tolist() == [False, True, False]
    assert cross_entropy_rows(logits, labels, softcap).isnan().tolist() == [False, True, False]
    assert logits[1].isnan().sum() >= 1
    assert logits[[0, 2]].isfinite().all()


def test_infinite_logits_are_as_in_torch(kernel_path: str) -> None:
    for row in (row_of(100, {5: INFINITY}), row_of(100, {}, -INFINITY)):
        logits, labels = row.repeat(2, 1), torch.tensor([5, 6])
        assert F.cross_entropy(logits, labels, reduction="none").isnan().all()
        assert cross_entropy_losses(logits, labels).isnan().all()
        assert cross_entropy_rows(logits, labels).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("name", list(adversarial(torch.float32)))
def test_adversarial_rows_have_torchs_loss(kernel_path: str, name: str, dtype: torch.dtype, softcap: float) -> None:
    logits, labels = adversarial(dtype)[name].view(1, 200), torch.tensor([77])
    expected, gradient = exact(logits, labels, softcap)
    in_place = logits.clone()
    losses = cross_entropy_rows(in_place, labels, softcap)
    limit = torch.finfo(torch.float32).max  # the spread of logits of both signs may be twice the largest float
    assert torch.allclose(losses.double().clamp(max=limit), expected.clamp(max=limit), rtol=1e-5)
    assert torch.allclose(in_place.double(), gradient, rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=1e-7)


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_memory_changes_no_bit(path: str, dtype: torch.dtype) -> None:
    logits, labels = inputs(9, 777, dtype)
    with native.using(path):
        gradient = logits.clone()
        losses = cross_entropy_rows(gradient, labels)
        for other, labels2 in zip(awkward(logits), (labels.repeat_interleave(2)[::2],) * 4, strict=True):
            assert torch.equal(cross_entropy_losses(other, labels2), losses)
            assert torch.equal(cross_entropy_rows(other, labels2), losses)
            assert torch.equal(other, gradient)


def test_the_gradient_of_float64_logits_is_the_numeric_one() -> None:
    """`cross_entropy_rows` as the backward of `cross_entropy_losses`, as a caller's autograd.Function has it."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, labels: Tensor, softcap: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            gradient = logits.clone()
            losses = cross_entropy_rows(gradient, labels, softcap)
            ctx.save_for_backward(gradient)
            return losses.sum()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
            return grads[0] * ctx.saved_tensors[0], None, None

    logits, labels = torch.randn(4, 9, dtype=torch.float64, requires_grad=True), torch.tensor([0, 8, 3, 3])
    for softcap in (0.0, 2.0):
        assert torch.autograd.gradcheck(lambda x, cap=softcap: Loss.apply(x, labels, cap), logits)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(kernel_path: str, dtype: torch.dtype, softcap: float) -> None:
    logits, labels = inputs(3, 100, dtype)
    torch.library.opcheck(OPS.cross_entropy_losses, (logits, labels, softcap))
    torch.library.opcheck(OPS.cross_entropy_rows, (logits, labels, softcap))


def test_compile_passes_through_without_a_break() -> None:
    def step(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits * 2
        losses = OPS.cross_entropy_rows(logits, labels, 0.0)
        return losses.sum(), logits + 1

    logits, labels = inputs(4, 50, torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(logits, labels), step(logits, labels), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("label", [-100, -1, 50, 2**40])
def test_a_label_outside_the_vocabulary_is_refused_before_anything_is_written(kernel_path: str, label: int) -> None:
    logits, labels = inputs(3, 50, torch.float32)
    kept, labels[1] = logits.clone(), label
    for call in (cross_entropy_losses, cross_entropy_rows):
        with pytest.raises(InputError, match=f"label {label} of row 1 is outside the vocabulary: allowed are 0 to 49"):
            call(logits, labels)
    assert torch.equal(logits, kept)


def test_what_does_not_fit_is_refused(kernel_path: str) -> None:
    logits, labels = inputs(3, 50, torch.float32)
    for bad in (labels[:2], labels.int(), labels[:, None]):
        with pytest.raises(InputError, match=r"give logits \(N, V\) and labels \(N,\) int64"):
            cross_entropy_rows(logits, bad)
    for softcap in (-1.0, NAN, INFINITY):
        with pytest.raises(InputError, match="softcap"):
            cross_entropy_rows(logits, labels, softcap)


KERNEL = native.Function("cross_entropy")


@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("columns", [1, 15, 33, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_no_kernel_writes_outside_its_buffers(path: str, columns: int, dtype: torch.dtype, softcap: float) -> None:
    (logits, logits_raw), (losses, losses_raw) = guarded(3 * columns, dtype), guarded(3, torch.float32)
    logits.copy_(gaussian(3 * columns, dtype))
    with native.using(path):
        KERNEL(logits, torch.zeros(3, dtype=torch.int64), losses, 3, columns, softcap, 1, native.DTYPES[dtype], 2)
    assert_guard(logits_raw)
    assert_guard(losses_raw)


@pytest.mark.skipif(not NATIVE, reason="the native library is not built")
@pytest.mark.parametrize(
    ("rows", "columns", "softcap", "dtype"),
    [
        (-1, 8, 0, 0),
        (8, -1, 0, 0),
        (9, 8, 0, 0),
        (8, 9, 0, 0),
        (2**62, 4, 0, 0),
        (8, 7, 0, 0),
        (8, 8, -1, 0),
        (8, 8, 0, 3),
    ],
)
def test_sizes_beyond_the_buffers_and_labels_beyond_the_row_are_errors(
    rows: int, columns: int, softcap: float, dtype: int
) -> None:
    logits, labels, losses = torch.zeros(8, 8), torch.full((8,), 7), torch.zeros(8)
    for gradient in (0, 1):
        KERNEL(logits, labels, losses, 8, 8, 0.0, gradient, 0, 2)
        with pytest.raises(InputError, match="refused its arguments"):
            KERNEL(logits, labels, losses, rows, columns, float(softcap), gradient, dtype, 2)


@pytest.mark.parametrize("path", NATIVE)
def test_the_number_of_threads_changes_no_bit(path: str) -> None:
    logits, labels = inputs(40, 3000, torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with native.using(path):
                gradient = logits.clone()
                found.append((cross_entropy_rows(gradient, labels), gradient))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
