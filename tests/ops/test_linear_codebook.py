"""The linear layer over 4-bit codes: against float64, its gradients, torch.library's own checks, torch.compile."""

import pytest
import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.linear import codebook as module
from entrenar.ops.linear import panels
from entrenar.ops.linear.codebook import linear_codebook
from entrenar.ops.scales import nest_scales
from tests.support.samples import DTYPES

CODEBOOK = torch.linspace(-1, 1, 16)
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# (out, in): blocks straddle rows, rows of odd length, a row of 1, more columns than a tile, a row count not of 4
SHAPES = [(1, 1), (64, 64), (7, 129), (33, 577), (130, 96), (5, 4304), (3, 2049), (1, 64), (64, 1)]


def weight(out_features: int, in_features: int, nested: bool) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(out_features * 10_007 + in_features)
    count = out_features * in_features
    packed = torch.randint(0, 256, (-(-count // 2),), generator=generator, dtype=torch.uint8)
    scales = torch.rand(-(-count // 64), generator=generator) * 0.1
    return packed, nest_scales(scales) if nested else [scales]


def close(found: Tensor, x: Tensor, factor: Tensor, added: Tensor | None = None) -> None:
    """Found ≈ x @ factor + added, to the rounding of its dtype relative to the sum of magnitudes."""
    exact = x.double() @ factor.double()
    size = x.double().abs() @ factor.double().abs()
    if added is not None:
        exact, size = exact + added.double(), size + added.double().abs()
    assert ((found.double() - exact).abs() <= ROUNDING[found.dtype] * size + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 17, 70])
def test_forward_and_backward_are_the_product_with_the_dequantized_weight(
    kernel_path: str, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    packed, scales = weight(*shape, nested=tokens == 3)
    dense = dequantize_codebook(packed, scales, CODEBOOK, 64, shape[0] * shape[1], dtype).view(shape)
    x = torch.randn(tokens, shape[1]).to(dtype).requires_grad_()
    bias = torch.randn(shape[0]).to(dtype) if tokens != 1 else None
    y = linear_codebook(x, packed, scales, CODEBOOK, 64, shape[0], bias)
    close(y.detach(), x.detach(), dense.t(), bias)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    close(x.grad, grad, dense)


@pytest.mark.parametrize("panel_bytes", [1, 4096, 1 << 23])
def test_panels_of_any_size_cover_the_weight(monkeypatch: pytest.MonkeyPatch, panel_bytes: int) -> None:
    monkeypatch.setattr(panels, "PANEL_BYTES", panel_bytes)
    packed, scales = weight(200, 300, nested=False)
    dense = dequantize_codebook(packed, scales, CODEBOOK, 64, 60_000, torch.float32).view(200, 300)
    x = torch.randn(40, 300, requires_grad=True)
    y = linear_codebook(x, packed, scales, CODEBOOK, 64, 200)
    close(y.detach(), x.detach(), dense.t())
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    close(x.grad, torch.ones(40, 200), dense)


def test_any_leading_dimensions_and_strides(kernel_path: str) -> None:
    packed, scales = weight(33, 577, nested=False)
    x = torch.randn(577, 2, 3).permute(1, 2, 0)
    y = linear_codebook(x, packed, scales, CODEBOOK, 64, 33)
    assert y.shape == (2, 3, 33)
    flat = linear_codebook(x.reshape(6, 577).contiguous(), packed, scales, CODEBOOK, 64, 33)
    assert torch.allclose(y.view(6, 33), flat, atol=1e-4)
    assert linear_codebook(x[0, 0], packed, scales, CODEBOOK, 64, 33).shape == (33,)


def test_gradients_of_first_and_second_order_are_numeric_ones() -> None:
    packed, scales = weight(7, 9, nested=False)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return linear_codebook(x, packed, scales, CODEBOOK, 64, 7, bias)

    assert torch.autograd.gradcheck(layer, (x, bias))
    assert torch.autograd.gradgradcheck(layer, (x, bias))


@pytest.mark.parametrize("tokens", [2, 40])
def test_opcheck(kernel_path: str, tokens: int) -> None:
    packed, scales = weight(64, 96, nested=True)
    x = torch.randn(tokens, 96, requires_grad=True)
    bias = torch.randn(64)
    torch.library.opcheck(torch.ops.entrenar.linear_codebook, (x, packed, scales, CODEBOOK, 64, 64, bias))
    grad = torch.randn(tokens, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.entrenar.linear_codebook_backward, (grad, packed, scales, CODEBOOK, 64, 96))


def test_compile_passes_through_without_a_break() -> None:
    packed, scales = weight(64, 96, nested=False)

    def layer(x: Tensor) -> Tensor:
        return torch.relu(linear_codebook(x * 2, packed, scales, CODEBOOK, 64, 64)).sum()

    x = torch.randn(20, 96, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer(x).backward()
    expected, x.grad = x.grad, None
    found = compiled(x)
    found.backward()
    assert torch.allclose(found, layer(x))
    assert expected is not None
    assert x.grad is not None
    assert torch.allclose(x.grad, expected)


def test_scratch_made_in_inference_mode_serves_training() -> None:
    packed, scales = weight(64, 96, nested=False)
    x = torch.randn(40, 96)
    with torch.inference_mode():
        expected = linear_codebook(x, packed, scales, CODEBOOK, 64, 64)
    found = linear_codebook(x.requires_grad_(), packed, scales, CODEBOOK, 64, 64)
    found.sum().backward()
    assert torch.equal(found, expected)


def test_few_tokens_never_make_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("the native library is not built")

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a scratch was asked for")

    monkeypatch.setattr(module, "scratch_for", refuse)
    packed, scales = weight(64, 96, nested=False)
    linear_codebook(torch.randn(16, 96, requires_grad=True), packed, scales, CODEBOOK, 64, 64).sum().backward()
