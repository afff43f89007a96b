"""Tensors of 2³¹ elements and more: the arithmetic without the memory, and once for real (`-m slow`)."""

import mmap

import pytest
import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.codebook.quantize import quantize_codebook

NATIVE = [path for path in native.supported_paths() if path != "reference"]
pytestmark = pytest.mark.parametrize("path", NATIVE)
CODEBOOK = torch.linspace(-1, 1, 16)
PANEL = native.Function("dequantize_codebook_panel")
MAP_NORESERVE = 0x4000  # Python names it from 3.13 on; ignored where another system gives it no meaning
ROWS, COLUMNS = 2**22 + 1, 4096  # 2³⁴ elements and a row


def virtual(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take an address range and no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


def test_the_last_row_of_a_weight_of_16_billion_elements(path: str) -> None:
    packed, scales = virtual(ROWS * COLUMNS // 2, torch.uint8), virtual(ROWS * COLUMNS // 64, torch.float32)
    packed[-COLUMNS // 2 :] = torch.arange(COLUMNS // 2).to(torch.uint8)
    scales[-COLUMNS // 64 :] = torch.arange(COLUMNS // 64).float()
    expected = dequantize_codebook(
        packed[-COLUMNS // 2 :], [scales[-COLUMNS // 64 :]], CODEBOOK, 64, COLUMNS, torch.float32
    )
    out = torch.empty(COLUMNS)
    with native.using(path):
        PANEL(
            packed, scales, None, None, None, CODEBOOK, out,
            ROWS * COLUMNS, COLUMNS, ROWS - 1, 1, 0, COLUMNS, 64, 0, 2,
        )  # fmt: skip
    assert torch.equal(out, expected)


@pytest.mark.slow
def test_two_billion_elements_there_and_back(path: str) -> None:
    """5 GB; the last blocks are checked against a small tensor of the same numbers."""
    if path == "generic":
        pytest.skip("a minute, and the arithmetic is the same")
    count, tail = 2**31 + 64, 64 * 1000
    flat = virtual(count, torch.bfloat16)
    flat[-tail:] = torch.randn(tail).bfloat16()
    with native.using(path):
        packed, absmax = quantize_codebook(flat, CODEBOOK, 64)
        small = quantize_codebook(flat[-tail:].clone(), CODEBOOK, 64)
        assert torch.equal(packed[-tail // 2 :], small[0])
        assert torch.equal(absmax[-tail // 64 :], small[1])
        restored = dequantize_codebook(packed, [absmax], CODEBOOK, 64, count, torch.bfloat16)
        assert torch.equal(
            restored[-tail:], dequantize_codebook(*small[:1], [small[1]], CODEBOOK, 64, tail, flat.dtype)
        )
        assert not restored[: 64 * 1000].any()
