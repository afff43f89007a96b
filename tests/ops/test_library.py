"""torch.library's own checks of every operation, on each path."""

import logging
from typing import Any

import pytest
import torch

from entrenar.ops import gpu_kernels, scales
from entrenar.ops.codebook import dequantize as dequantize_codebook
from entrenar.ops.codebook import quantize as quantize_codebook
from entrenar.ops.symmetric import dequantize as dequantize_int8
from entrenar.ops.symmetric import quantize as quantize_symmetric
from tests.support.samples import gaussian

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


def broken(*_: object) -> torch.Tensor:
    raise RuntimeError("no C compiler")


@pytest.mark.parametrize(("kernel", "said"), [
    (torch.sin, None), (broken, "cannot compile twice here (no C compiler)"), (torch.cos, "wrong numbers"),
    (torch.Tensor.neg_, "wrong numbers"),
])  # fmt: skip
def test_a_gpu_kernel_serves_once_it_agrees(
    kernel: Any, said: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_kernels, "are_there", lambda: True)
    monkeypatch.setattr(gpu_kernels, "_tried", {})
    samples: list[torch.Tensor] = []

    def sample(device: torch.device) -> list[tuple[torch.Tensor]]:
        samples.append(torch.ones(3, device=device))
        return [(samples[-1],)]

    args = (torch.ones(1, dtype=torch.bfloat16),)
    for _ in range(2):
        assert gpu_kernels.serves("twice", gpu_kernels.GpuKernel(kernel, sample), torch.sin, args) is (said is None)
    assert len(samples) <= 4  # tried once, in float32 and in bfloat16
    assert (said or "") in caplog.text
    assert bool(caplog.text) is (said is not None)


@pytest.mark.parametrize("name", [None, "triton"])
def test_where_triton_is_missing_or_switched_off_that_is_said(
    name: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_kernels, "find_spec", lambda _: name)
    monkeypatch.setattr(gpu_kernels.native, "asks_for_reference", lambda: name is not None)
    gpu_kernels.are_there.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert not gpu_kernels.are_there()
    finally:
        gpu_kernels.are_there.cache_clear()
    assert "missing or switched off" in caplog.text
