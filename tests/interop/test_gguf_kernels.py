"""GGUF blocks against llama.cpp's own quantizers: the same bytes where nothing is searched, less error where it is."""

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from entrenar.gguf.reader import GGUFFile
from entrenar.ops.gguf.blocks import dequantize_gguf, quantize_gguf

pytestmark = pytest.mark.interop

IDS = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q4_k": 12, "q5_k": 13, "q6_k": 14}
K_TYPES = ("q4_k", "q5_k", "q6_k")
DRAWS = ("gaussian", "heavy tails", "shifted")


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    """libggml-base of llama-cpp-python; the package itself need not be imported."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    address, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, number, number, number, address]
    return library


def theirs(ggml: ctypes.CDLL, weight: Tensor, type: str, importance: Tensor | None = None) -> Tensor:
    """llama.cpp's blocks of weight (rows, columns) float32."""
    rows, columns = weight.shape
    packed = torch.empty_like(quantize_gguf(weight, type))
    matrix = None if importance is None else importance.data_ptr()
    written = ggml.ggml_quantize_chunk(IDS[type], weight.data_ptr(), packed.data_ptr(), 0, rows, columns, matrix)
    assert written == packed.numel()
    return packed


def draw(kind: str, rows: int = 256, columns: int = 1024) -> Tensor:
    generator = np.random.default_rng(7)
    shape = (rows, columns)
    values = generator.standard_t(3, shape) if kind == "heavy tails" else generator.standard_normal(shape)
    return torch.from_numpy(values).float() + (0.5 if kind == "shifted" else 0.0)


def error(packed: Tensor, weight: Tensor, type: str, counts: Tensor | float = 1.0) -> float:
    return float((counts * (dequantize_gguf(packed, type, weight.shape[1]) - weight).square()).mean())


@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
@pytest.mark.parametrize("kind", DRAWS)
def test_legacy_bytes_are_llama_cpps(ggml: ctypes.CDLL, type: str, kind: str) -> None:
    weight = draw(kind)
    assert torch.equal(quantize_gguf(weight, type), theirs(ggml, weight, type))


@pytest.mark.parametrize("type", ["q4_1", "q5_1", "q8_0"])
def test_zeros_of_both_signs_are_llama_cpps(ggml: ctypes.CDLL, type: str) -> None:
    weight = draw("gaussian").clamp(min=0) * draw("shifted").sign()
    assert torch.equal(quantize_gguf(weight, type), theirs(ggml, weight, type))
    assert torch.equal(quantize_gguf(weight * 0.0, type), theirs(ggml, weight * 0.0, type))


@pytest.mark.parametrize("type", K_TYPES)
@pytest.mark.parametrize("kind", DRAWS)
def test_k_error_is_below_llama_cpps(ggml: ctypes.CDLL, type: str, kind: str) -> None:
    weight = draw(kind)
    ours, peer = quantize_gguf(weight, type), theirs(ggml, weight, type)
    assert error(ours, weight, type) <= error(peer, weight, type)
    # Large weights are not neglected for it.
    assert error(ours, weight, type, weight.square()) <= error(peer, weight, type, weight.square())


@pytest.mark.parametrize("type", K_TYPES)
@pytest.mark.parametrize("name", ["blk.0.ffn_down", "blk.12.attn_v", "blk.20.ffn_gate", "blk.29.attn_output"])
def test_k_error_on_real_weights_is_below_llama_cpps(ggml: ctypes.CDLL, smollm2: Path, type: str, name: str) -> None:
    weight = GGUFFile(smollm2).read(f"{name}.weight").view(-1, 256)
    assert error(quantize_gguf(weight, type), weight, type) <= error(theirs(ggml, weight, type), weight, type)


@pytest.mark.parametrize("type", K_TYPES)
@pytest.mark.parametrize("kind", DRAWS)
def test_importance_serves_at_least_as_well_as_llama_cpps_matrix(ggml: ctypes.CDLL, type: str, kind: str) -> None:
    weight = draw(kind)
    importance = torch.randn(1024, generator=torch.Generator().manual_seed(3)).exp()
    ours, peer = quantize_gguf(weight, type, importance), theirs(ggml, weight, type, importance)
    assert error(ours, weight, type, importance) <= error(peer, weight, type, importance)
