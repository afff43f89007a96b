"""GGUF blocks: equal to the `gguf` package on every path; K quantizers equal to their reference."""

import warnings

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.gguf.blocks import DEQUANTIZED_TYPES, QUANTIZED_TYPES, dequantize_gguf, quantize_gguf

PATHS = native.supported_paths()
NATIVE_PATHS = [path for path in PATHS if path != "reference"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
K_TYPES = ("q4_k", "q5_k", "q6_k")
GUARD = 64  # bytes around a buffer that must stay as they were

needs_native = pytest.mark.skipif(not NATIVE_PATHS, reason="the native library is not built")
_quantize = native.Function("quantize_gguf")
_dequantize = native.Function("dequantize_gguf")


def _ggml(type: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[type.upper()]


def _row_bytes(type: str, columns: int) -> int:
    elements, size = gguf.GGML_QUANT_SIZES[_ggml(type)]
    return columns // elements * size


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def _gguf_values(packed: Tensor, type: str) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), _ggml(type)))


def _gguf_bytes(weight: Tensor, type: str) -> Tensor:
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(gguf.quants.quantize(weight.float().numpy(), _ggml(type)))


def _weights() -> dict[str, Tensor]:
    """Rows of 512 that try the arithmetic's corners."""
    normal = _random(33, 512)
    outlier = torch.zeros(32, 512)
    outlier[torch.arange(32), torch.arange(32) * 15] = _random(32, seed=2) * 1000
    return {
        "normal": normal,
        "ties": (normal * 2).round() / 2,
        "zeros": torch.zeros(2, 512),
        "negative zeros": -torch.zeros(2, 512),
        "positive or zero": normal.clamp(min=0),
        "negative or zero": normal.clamp(max=0),
        "negative": -5 - 0.01 * normal.abs(),
        "positive": 5 + normal.abs(),
        "constant": torch.full((2, 512), 0.3),
        "negative constant": torch.full((2, 512), -0.3),
        "outlier": outlier,
        "denormal": normal * 1e-41,
        "reciprocal overflows": normal * 1e-38,
        "scale is a denormal half": normal * 1e-6,
        "scale overflows half": normal * 1e6,
        "largest": torch.where(normal > 0, 3.4e38, -3.4e38),
        "many magnitudes": normal * torch.exp(3 * _random(33, 512, seed=3)),
    }


WEIGHTS = _weights()


def _cases(dtype: torch.dtype) -> dict[str, Tensor]:
    """What is finite in `dtype`. Small numbers round to zeros of one sign here: there is a test for both."""
    cast = {name: weight.to(dtype) for name, weight in WEIGHTS.items()}
    cast = {name: weight if (weight != 0).any() else weight + 0.0 for name, weight in cast.items()}
    return {name: weight for name, weight in cast.items() if weight.isfinite().all()}


@pytest.mark.parametrize("type", LEGACY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_legacy_bytes_are_the_gguf_packages(type: str, dtype: torch.dtype, kernel_path: str) -> None:
    for name, weight in _cases(dtype).items():
        expected = _gguf_bytes(weight, type)
        assert torch.equal(quantize_gguf(weight, type), expected), name


@pytest.mark.parametrize("type", ["q4_1", "q5_1"])
def test_of_two_zeros_the_first_is_the_minimum(type: str) -> None:
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 1] = -0.0, -0.0
    for path in PATHS:
        with native.using(path):
            packed = quantize_gguf(weight, type)
        assert packed[:, 2:4].tolist() == [[0, 128], [0, 0]], path


@needs_native
@pytest.mark.parametrize("type", K_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_k_bytes_are_the_references_on_every_path(type: str, dtype: torch.dtype, weighted: bool) -> None:
    importance = _random(512, seed=4).square() if weighted else None
    for name, weight in _cases(dtype).items():
        with native.using("reference"):
            expected = quantize_gguf(weight, type, importance)
        for path in NATIVE_PATHS:
            with native.using(path):
                assert torch.equal(quantize_gguf(weight, type, importance), expected), (name, path)


@pytest.mark.parametrize(("type", "error"), [("q4_k", 0.00509), ("q5_k", 0.00131), ("q6_k", 0.000315)])
def test_k_error_on_gaussian_weights_is_at_most_llama_cpps(type: str, error: float, kernel_path: str) -> None:
    weight = _random(64, 1024)
    packed = quantize_gguf(weight, type)
    assert (_gguf_values(packed, type) - weight).square().mean() < error


@pytest.mark.parametrize("type", K_TYPES)
@pytest.mark.parametrize(
    "name", ["negative", "positive", "constant", "negative constant", "outlier", "zeros", "many magnitudes"]
)
def test_k_types_keep_what_is_easy_to_keep(type: str, name: str) -> None:
    weight = WEIGHTS[name]
    values = _gguf_values(quantize_gguf(weight, type), type)
    assert (values - weight).norm() <= 0.06 * weight.norm()


@pytest.mark.parametrize("type", K_TYPES)
def test_importance_moves_the_error_to_the_columns_that_do_not_count(type: str) -> None:
    weight = _random(64, 512)
    importance = torch.where(torch.arange(512) % 4 == 0, 100.0, 1.0)
    counting = importance > 1

    def error(packed: Tensor) -> Tensor:
        return (_gguf_values(packed, type) - weight)[:, counting].square().mean()

    assert error(quantize_gguf(weight, type, importance)) < 0.8 * error(quantize_gguf(weight, type))


@pytest.mark.parametrize("type", DEQUANTIZED_TYPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_values_are_the_gguf_packages(type: str, dtype: torch.dtype, kernel_path: str) -> None:
    packed = _random_bytes(65, _row_bytes(type, 768))
    expected = _gguf_values(packed, type).to(dtype)  # some scales are infinite or NaN
    out = torch.empty_like(expected)
    fresh = dequantize_gguf(packed, type, 768, dtype)
    assert dequantize_gguf(packed, type, 768, dtype, out) is out
    for values in (fresh, out):
        assert torch.equal(values.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert torch.equal(_bits(values[kept]), _bits(expected[kept]))


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


@pytest.mark.parametrize("type", QUANTIZED_TYPES)
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("columns", [0, 256, 768])
def test_small_and_empty_matrices_there_and_back(type: str, rows: int, columns: int, kernel_path: str) -> None:
    weight = _random(rows, columns)
    packed = quantize_gguf(weight, type)
    values = dequantize_gguf(packed, type, columns)
    assert packed.shape == (rows, _row_bytes(type, columns))
    assert values.shape == weight.shape
    assert (values - weight).norm() <= 0.1 * weight.norm()


@pytest.mark.parametrize("type", QUANTIZED_TYPES)
def test_a_transposed_weight_is_read_in_its_own_order(type: str) -> None:
    weight = _random(256, 256)
    assert torch.equal(quantize_gguf(weight.T, type), quantize_gguf(weight.T.contiguous(), type))


@needs_native
@pytest.mark.parametrize("path", NATIVE_PATHS)
@pytest.mark.parametrize("type", QUANTIZED_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_at_odd_addresses_writes_only_its_result(type: str, dtype: torch.dtype, path: str) -> None:
    weight = _random(3, 256).to(dtype)
    raw = torch.zeros(weight.numel() * weight.element_size() + 1, dtype=torch.uint8)
    raw[1:] = weight.view(torch.uint8).flatten()
    size = 3 * _row_bytes(type, 256)
    guarded = torch.full((size + 2 * GUARD + 1,), 0xA5, dtype=torch.uint8)
    out = guarded[GUARD + 1 : GUARD + 1 + size]
    with native.using(path):
        _quantize(raw[1:], out, None, 3, 256, _ggml(type), native.DTYPES[dtype], 1)
        assert torch.equal(out.view(3, -1), quantize_gguf(weight, type))
    assert (guarded[: GUARD + 1] == 0xA5).all()
    assert (guarded[GUARD + 1 + size :] == 0xA5).all()


@needs_native
@pytest.mark.parametrize("path", NATIVE_PATHS)
@pytest.mark.parametrize("type", DEQUANTIZED_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_at_odd_addresses_writes_only_its_result(type: str, dtype: torch.dtype, path: str) -> None:
    packed = _random_bytes(3 * _row_bytes(type, 256) + 1)[1:]
    size = 3 * 256 * dtype.itemsize
    guarded = torch.full((size + 2 * GUARD + 1,), 0xA5, dtype=torch.uint8)
    out = guarded[GUARD + 1 : GUARD + 1 + size]
    with native.using(path):
        _dequantize(packed, out, 3, 256, _ggml(type), native.DTYPES[dtype], 1)
        expected = dequantize_gguf(packed.view(3, -1), type, 256, dtype).view(torch.uint8)
    assert torch.equal(out, expected.flatten())
    assert (guarded[: GUARD + 1] == 0xA5).all()
    assert (guarded[GUARD + 1 + size :] == 0xA5).all()


@needs_native
@pytest.mark.parametrize("type", QUANTIZED_TYPES)
def test_threads_do_not_change_a_byte(type: str) -> None:
    weight, importance = _random(133, 768), _random(768, seed=4).square()
    results = []
    for threads in (1, 2, 7):
        packed = torch.empty(133, _row_bytes(type, 768), dtype=torch.uint8)
        values = torch.empty_like(weight)
        _quantize(weight, packed, importance if type in K_TYPES else None, 133, 768, _ggml(type), 0, threads)
        _dequantize(packed, values, 133, 768, _ggml(type), 0, threads)
        results.append((packed, values))
    for packed, values in results[1:]:
        assert torch.equal(packed, results[0][0])
        assert torch.equal(values, results[0][1])


@needs_native
@pytest.mark.parametrize(
    ("rows", "columns", "type", "dtype", "message"),
    [
        (-1, 256, 12, 0, "negative or overflows"),
        (1, -256, 12, 0, "negative or overflows"),
        (1 << 40, 1 << 40, 12, 0, "negative or overflows"),
        (1, 255, 12, 0, "negative or overflows"),
        (1, 32, 12, 0, "negative or overflows"),
        (3, 256, 12, 0, "too small"),
        (1, 256, 12, 3, "dtype"),
        (1, 256, 1, 0, "out of range"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(rows: int, columns: int, type: int, dtype: int, message: str) -> None:
    weight, packed = torch.zeros(2, 256), torch.zeros(2, 144, dtype=torch.uint8)
    with pytest.raises(InputError, match=message):
        _quantize(weight, packed, None, rows, columns, type, dtype, 1)
    with pytest.raises(InputError, match=message):
        _dequantize(packed, weight, rows, columns, type, dtype, 1)


@needs_native
def test_an_importance_that_does_not_fit_is_refused_by_the_library() -> None:
    weight, packed = torch.zeros(1, 256), torch.zeros(1, 144, dtype=torch.uint8)
    with pytest.raises(InputError, match="too small"):
        _quantize(weight, packed, torch.ones(255), 1, 256, 12, 0, 1)
    with pytest.raises(InputError, match="out of range"):
        _quantize(weight, packed, torch.ones(256), 1, 256, 2, 0, 1)


def test_what_cannot_be_done_is_said_in_a_sentence() -> None:
    weight, packed = torch.zeros(2, 256), torch.zeros(2, 144, dtype=torch.uint8)
    with pytest.raises(InputError, match="'q2_k' cannot be quantized to: allowed are q4_0"):
        quantize_gguf(weight, "q2_k")
    with pytest.raises(InputError, match="multiple of 256"):
        quantize_gguf(weight[:, :32], "q4_k")
    with pytest.raises(InputError, match="importance"):
        quantize_gguf(weight, "q4_k", torch.ones(255))
    with pytest.raises(InputError, match="only q4_k, q5_k, q6_k use it"):
        quantize_gguf(weight, "q4_0", torch.ones(256))
    with pytest.raises(InputError, match="cannot be dequantized from"):
        dequantize_gguf(packed, "iq2_xs", 256)
    with pytest.raises(InputError, match="288 bytes, but the rows have 144"):
        dequantize_gguf(packed, "q4_k", 512)
    with pytest.raises(InputError, match="contiguous"):
        dequantize_gguf(packed, "q4_k", 256, out=torch.empty(256, 2).T)


def test_the_operators_pass_torchs_own_check() -> None:
    weight, packed = _random(2, 256), _random_bytes(2, 144) & 0x3F
    torch.library.opcheck(torch.ops.entrenar.quantize_gguf, (weight, "q4_k", torch.ones(256)))
    torch.library.opcheck(torch.ops.entrenar.quantize_gguf, (weight, "q8_0", None))
    torch.library.opcheck(torch.ops.entrenar.dequantize_gguf, (packed, "q4_k", 256, torch.bfloat16))
    torch.library.opcheck(torch.ops.entrenar.dequantize_gguf_into, (packed, "q4_k", torch.empty(2, 256)))
