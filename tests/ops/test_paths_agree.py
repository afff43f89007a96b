"""Every kernel on every path gives the reference's bits: hard shapes, hard values, awkward memory."""

import pytest
import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.codebook.dequantize import dequantize_codebook, dequantize_codebook_into
from entrenar.ops.codebook.quantize import quantize_codebook
from entrenar.ops.scales import decode_scales, nest_scales
from entrenar.ops.symmetric.dequantize import dequantize_int8
from entrenar.ops.symmetric.quantize import quantize_symmetric
from tests.support.samples import BLOCK_SIZES, COUNTS, DTYPES, adversarial, gaussian, unaligned

NATIVE = [path for path in native.supported_paths() if path != "reference"]
pytestmark = pytest.mark.parametrize("path", NATIVE)

SORTED = torch.linspace(-1, 1, 16) ** 3
SHUFFLED = SORTED[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
MAP = torch.linspace(-1, 1, 256)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    bits = torch.int16 if found.itemsize == 2 else torch.int32 if found.itemsize == 4 else torch.uint8
    both_nan = found.isnan() & expected.isnan()  # which NaN it is means nothing
    same = (found.contiguous().view(bits) == expected.contiguous().view(bits)) | both_nan
    assert same.all(), f"{(~same).sum()} of {same.numel()} differ, the first at {(~same).nonzero()[0].item()}"


def results(flat: Tensor, block_size: int) -> list[Tensor]:
    """All that the kernels make of `flat`, in a fixed order."""
    found = []
    count = flat.numel()
    for codebook in (SORTED, SHUFFLED):
        packed, absmax = quantize_codebook(flat, codebook, block_size)
        found += [packed, absmax]
        offset = absmax.mean().view(1) if count else torch.zeros(1)
        dynamic = [*nest_scales(absmax, offset, MAP), offset, MAP]
        for scales in ([absmax], dynamic):
            found += [dequantize_codebook(packed, scales, codebook, block_size, count, dtype) for dtype in DTYPES]
        found += [*dynamic, decode_scales(dynamic)]
    for limit in (7, 127):
        codes, scales = quantize_symmetric(flat, limit, block_size)
        linear = nest_scales(scales)
        found += [codes, scales, *linear, decode_scales(linear)]
        if limit == 127:
            found += [dequantize_int8(codes, s, block_size, dtype) for s in ([scales], linear) for dtype in DTYPES]
    return found


def compare(flat: Tensor, block_size: int, path: str, expected_of: Tensor | None = None) -> None:
    with native.using("reference"):
        expected = results(flat if expected_of is None else expected_of, block_size)
    with native.using(path):
        found = results(flat, block_size)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_on_every_count(path: str, dtype: torch.dtype, count: int) -> None:
    compare(gaussian(count, dtype), 64, path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_on_every_block_size(path: str, dtype: torch.dtype, block_size: int) -> None:
    compare(gaussian(3 * block_size + 7, dtype), block_size, path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(adversarial(torch.float32)))
def test_on_hard_values(path: str, dtype: torch.dtype, name: str) -> None:
    compare(adversarial(dtype)[name], 64, path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_unaligned_weights(path: str, dtype: torch.dtype) -> None:
    flat = gaussian(1001, dtype)
    compare(unaligned(flat), 64, path, expected_of=flat)


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_weights_with_gaps(path: str, dtype: torch.dtype) -> None:
    flat = gaussian(1001 * 3, dtype)[::3]
    compare(flat, 64, path, expected_of=flat.contiguous())


def test_on_unaligned_codes_and_scales(path: str) -> None:
    packed, absmax = quantize_codebook(gaussian(1001), SORTED, 64)
    for dtype in DTYPES:
        with native.using("reference"):
            expected = dequantize_codebook(packed, [absmax], SORTED, 64, 1001, dtype)
        with native.using(path):
            found = dequantize_codebook(unaligned(packed, 3), [unaligned(absmax)], unaligned(SORTED), 64, 1001, dtype)
        assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 32])
def test_into_a_callers_buffer_wherever_it_lies(path: str, dtype: torch.dtype, offset: int) -> None:
    packed, absmax = quantize_codebook(gaussian(1001), SORTED, 64)
    with native.using("reference"):
        expected = dequantize_codebook(packed, [absmax], SORTED, 64, 1001, dtype)
    out = unaligned(torch.zeros(1001, dtype=dtype), offset)
    with native.using(path):
        dequantize_codebook_into(packed, [absmax], SORTED, 64, out)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_larger_than_the_cache_which_are_written_past_it(path: str, dtype: torch.dtype) -> None:
    count = (24 << 20) // dtype.itemsize + 64 * 3 + 5
    packed = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    scales = torch.rand(-(-count // 64))
    with native.using("reference"):
        expected = dequantize_codebook(packed, [scales], SORTED, 64, count, dtype)
    with native.using(path):
        assert_same_bits(dequantize_codebook(packed, [scales], SORTED, 64, count, dtype), expected)


@pytest.mark.parametrize("row", [1, 5, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_with_a_scale_per_row_of_any_length(path: str, dtype: torch.dtype, row: int) -> None:
    flat = gaussian(row * 33, dtype)
    with native.using("reference"):
        expected = quantize_symmetric(flat, 127, row)
        restored = dequantize_int8(expected[0], [expected[1]], row, dtype)
    with native.using(path):
        found = quantize_symmetric(flat, 127, row)
        assert_same_bits(dequantize_int8(found[0], [found[1]], row, dtype), restored)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
