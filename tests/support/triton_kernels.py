"""Triton's kernels against the references beside them: on a GPU (tests/cuda), and interpreted on a CPU (tests/interop).

Both import these tests and say by the fixture `triton` where they run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from entrenar.ops.codebook import dequantize as dequantize_codebook
from entrenar.ops.cross_entropy import operation as cross_entropy
from entrenar.ops.elementwise import gated_activation, rms_norm, rotary
from entrenar.ops.scales import nest_scales

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
_HUGE = 1e4  # activations of real models have outliers of that size


@dataclass(frozen=True)
class Triton:
    """Where tensors lie, and what runs an operation's kernel."""

    device: str
    run: Callable[..., Any]

    def cuts_off(self, dtype: torch.dtype) -> bool:
        """What Triton's interpreter does to bfloat16, which a GPU rounds."""
        return self.device == "cpu" and dtype == torch.bfloat16

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        made = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))
        if made.numel() > 3:
            made.view(-1)[1], made.view(-1)[2] = _HUGE, 0
        return made.to(self.device, dtype)


def assert_near(found: Any, expected: Any, terms: Tensor | None = None) -> None:
    """One unit in the last place apart, or some float32 roundings of the terms it sums; of the row's largest number, if
    nothing is said of the terms.
    """
    found, expected = ((one,) if isinstance(one, Tensor) else one for one in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.is_contiguous()
        wide, exact = one.double(), other.double()
        assert torch.equal(wide.isfinite(), exact.isfinite())
        wide, exact = (each.nan_to_num(0.0, 0.0, 0.0) for each in (wide, exact))
        sizes = terms if terms is not None else exact.abs().amax(-1, keepdim=True) if exact.numel() else exact
        assert ((wide - exact).abs() <= torch.finfo(one.dtype).eps * exact.abs() + 1e-6 * sizes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2048), (7, 64), (2, 1), (5, 576), (3, 130), (2, 9000), (0, 64)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(triton: Triton, dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    x, grad, residual = (triton.random(*shape, dtype=dtype, seed=seed) for seed in range(3))
    weight = triton.random(shape[-1], dtype=torch.bfloat16)
    assert_near(triton.run("rms_norm", x, weight, 1e-5, offset), rms_norm._reference(x, weight, 1e-5, offset))
    for added in (None, residual):
        arguments = (grad, x, weight, 1e-5, offset, added)
        h = (grad.double() * (weight.double() + offset)).abs()
        r = (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        terms = r * h + x.double().abs() * (r**3 * (h * x.abs()).mean(-1, keepdim=True))
        assert_near(triton.run("rms_norm_backward", *arguments), rms_norm._backward_reference(*arguments), terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_of_what_does_not_lie_together(triton: Triton, dtype: torch.dtype) -> None:
    x, weight = triton.random(40, 6, dtype=dtype).t(), triton.random(40, dtype=dtype)
    assert_near(triton.run("rms_norm", x, weight, 1e-5, 0.0), rms_norm._reference(x, weight, 1e-5, 0.0).contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2048), (7, 63), (1,), (0, 64)])
@pytest.mark.parametrize("kind", gated_activation._GPU_KINDS)
def test_gated_activations(triton: Triton, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    gate, up, grad = (triton.random(*shape, dtype=dtype, seed=seed) for seed in range(3))
    assert_near(triton.run("gated_activation", gate, up, kind), gated_activation._reference(gate, up, kind))
    arguments = (grad, gate, up, kind)
    found = triton.run("gated_activation_backward", *arguments)
    assert_near(found, gated_activation._backward_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rotated", "batches"),
    [((2, 3, 4, 64), 64, 1), ((2, 3, 5, 80), 32, 2), ((1, 200, 32, 128), 128, 1), ((2, 2, 2, 6), 6, 2),
     ((2, 2, 9, 64), 48, 2), ((2, 5, 1, 256), 256, 1), ((0, 4, 2, 8), 8, 1), ((2, 3, 4, 8), 0, 1)],
)  # fmt: skip
@pytest.mark.parametrize("transpose", [False, True])
def test_rotations(
    triton: Triton, dtype: torch.dtype, shape: tuple[int, int, int, int], rotated: int, batches: int, transpose: bool
) -> None:
    batch, tokens, heads, width = shape
    x = triton.random(batch, heads, tokens, width, dtype=dtype).transpose(1, 2)
    cos, sin = (triton.random(batches, tokens, rotated, seed=seed).clamp(-1, 1) for seed in range(2))
    for one in (x, x.contiguous()):
        expected = rotary._reference(one, cos, sin, transpose).contiguous()
        found = triton.run("rotary", one, cos, sin, transpose)
        assert_near(found, expected)
        assert torch.equal(found, expected) or triton.cuts_off(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 5000), (4, 100), (2, 128257), (0, 10), (1, 1)])
def test_cross_entropy(triton: Triton, dtype: torch.dtype, softcap: float, rows: int, vocabulary: int) -> None:
    logits = (torch.randn(rows, vocabulary) * 4).to(triton.device, dtype)
    labels = torch.randint(0, vocabulary, (rows,)).to(triton.device)
    exact, kept = logits.double(), logits.clone()
    expected = cross_entropy._rows_reference(exact, labels, softcap)
    losses = triton.run("cross_entropy_losses", kept, labels, softcap)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(triton.run("cross_entropy_rows", kept, labels, softcap), losses)
    torch.testing.assert_close(kept.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-4), atol=1e-6)


def test_cross_entropy_of_what_is_no_number(triton: Triton) -> None:
    logits = triton.random(4, 100)
    logits[1, 7], logits[2, 7] = torch.nan, -torch.inf
    labels = torch.tensor([100, 3, 4, -1]).to(triton.device)
    losses = triton.run("cross_entropy_losses", logits, labels, 0.0)
    assert losses.isnan().tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nesting", [None, "dynamic", "linear"])
@pytest.mark.parametrize("count", [1, 63, 64, 2047, 2048, 2049, 4304 * 13])
def test_decoding(triton: Triton, dtype: torch.dtype, nesting: str | None, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    packed = torch.randint(0, 256, ((count + 1) // 2,), generator=generator, dtype=torch.uint8)
    scales = [torch.randn(-(-count // 64), generator=generator).abs() * 100]
    if nesting == "dynamic":
        table, offset = torch.linspace(-1, 1, 256), scales[0].mean().reshape(1)
        scales = [*nest_scales(scales[0], offset, table), offset, table]
    if nesting == "linear":
        scales = nest_scales(scales[0])
    packed, *scales = (each.to(triton.device) for each in (packed, *scales))
    values = torch.randn(16, generator=generator).to(triton.device)
    found = triton.run("dequantize_codebook", packed, scales, values, 64, count, dtype)
    expected = torch.empty(count, dtype=dtype, device=triton.device)
    dequantize_codebook._reference_into(packed, scales, values, 64, expected)
    assert_near(found, expected)
    assert torch.equal(found, expected) or triton.cuts_off(dtype)
