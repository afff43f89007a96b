"""torch.library's own checks of every operation, on each path."""

import logging
import sys

import pytest
import torch
from samples import gaussian

from entrenar.ops import (
    dequantize_codebook,
    dequantize_int8,
    gpu_kernels,
    quantize_codebook,
    quantize_symmetric,
    scales,
)

assert all((dequantize_codebook, dequantize_int8, quantize_codebook, quantize_symmetric, scales))  # they register
CODEBOOK = torch.linspace(-1, 1, 16)
MAP = torch.linspace(-1, 1, 256)
BYTES = torch.arange(100, dtype=torch.uint8)
OPS = torch.ops.entrenar
CALLS = {
    "quantize_codebook": (gaussian(199), CODEBOOK, 64),
    "dequantize_codebook": (BYTES, [torch.ones(4)], CODEBOOK, 64, 199, torch.bfloat16),
    "dequantize_codebook_into": (BYTES, [torch.ones(4)], CODEBOOK, 64, torch.zeros(199)),
    "quantize_symmetric": (gaussian(199), 127, 64),
    "dequantize_int8": (BYTES, [torch.ones(2)], 64, torch.float16),
    "nest_scales": (gaussian(300).abs(), torch.ones(1), MAP),
    "decode_scales": ([BYTES, torch.ones(1), torch.ones(1), MAP],),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_opcheck(kernel_path: str, name: str) -> None:
    torch.library.opcheck(getattr(OPS, name), CALLS[name])


def test_compile_passes_through_quantization() -> None:
    def there_and_back(flat: torch.Tensor) -> torch.Tensor:
        packed, absmax = OPS.quantize_codebook(flat, CODEBOOK, 64)
        return OPS.dequantize_codebook(packed, [absmax], CODEBOOK, 64, flat.numel(), torch.float32) + 1

    flat = gaussian(1000)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(flat), there_and_back(flat))


@pytest.mark.parametrize(("found", "said"), [(None, "missing or switched off"), (object(), "cannot compile here")])
def test_where_triton_does_not_serve_that_is_said_and_pytorch_does(
    found: object, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_kernels, "find_spec", lambda _: found)
    monkeypatch.setitem(sys.modules, "entrenar.ops.elementwise_gpu", None)  # an ImportError, as any other
    gpu_kernels.available.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert not gpu_kernels.available()
    finally:
        gpu_kernels.available.cache_clear()
    assert said in caplog.text
