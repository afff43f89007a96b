"""Number formats on a GPU: the reference's bits, and products and gradients to rounding."""

import pytest
import torch
from torch import Tensor

from entrenar.layers.quantized_linear import quantized_linear
from entrenar.ops.gguf.blocks import DEQUANTIZED_TYPES, dequantize_gguf
from entrenar.ops.linear.gguf import block_of
from entrenar.quant.tensor import QuantizedTensor, as_stored_tensor, quantize

pytestmark = pytest.mark.cuda
_GPU = torch.device("cuda")
_FORMATS = [(format, double) for format in ("nf4", "fp4", "int4", "int8") for double in (False, True)]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("format", "double"), _FORMATS)
@pytest.mark.parametrize("shape", [(64, 128), (3, 67), (2100, 1024), (0, 64)])
def test_quantizing_there_and_here_is_the_same(format: str, double: bool, shape: tuple[int, int]) -> None:
    weight = _random(*shape)
    here = quantize(weight, format=format, double_quant=double)
    there = quantize(weight.to(_GPU), format=format, double_quant=double)
    assert torch.equal(there.parts["codes"].cpu(), here.parts["codes"])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(here.to(_GPU).dequantize(dtype).cpu(), here.dequantize(dtype))


@pytest.mark.parametrize("type", DEQUANTIZED_TYPES)
def test_blocks_of_a_gguf_decode_to_the_same_bits(type: str) -> None:
    elements, size = block_of(type)
    packed = torch.randint(0, 256, (130, 512 // elements * size), dtype=torch.uint8)
    here = dequantize_gguf(packed, type, 512)
    there = dequantize_gguf(packed.to(_GPU), type, 512).cpu()
    assert torch.equal(here.isnan(), there.isnan())
    assert torch.equal(here.nan_to_num(), there.nan_to_num())


def _held(format: str) -> QuantizedTensor:
    if format in ("q4_k", "q8_0"):
        elements, size = block_of(format)
        packed = torch.randint(0, 256, (96, 256 // elements * size), dtype=torch.uint8)
        packed[:, 1::size] &= 0x3B  # the scale's exponent: no infinity, nothing huge
        packed[:, 3::size] &= 0x3B
        return as_stored_tensor(packed, format)
    return quantize(_random(96, 256), format=format)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8", "q4_k", "q8_0"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_layers_result_and_gradient(format: str, tokens: int) -> None:
    held = _held(format)
    x, grad = _random(tokens, 256), _random(tokens, 96)
    found: list[tuple[Tensor, Tensor]] = []
    for weight in (held, held.to(_GPU)):
        inner = x.to(weight.device, copy=True).requires_grad_()
        y = quantized_linear(inner, weight)
        y.backward(grad.to(weight.device))
        assert inner.grad is not None
        found.append((y.detach().cpu(), inner.grad.cpu()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
