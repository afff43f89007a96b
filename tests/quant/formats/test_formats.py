"""Each format against its definition, written out in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.quant.codebooks import FP4, NF4
from entrenar.quant.format import Format
from entrenar.quant.formats import fp4, int4, int8, nf4
from entrenar.quant.scales import as_float

COUNTS = st.integers(1, 300) | st.sampled_from([1, 63, 64, 65])
SEEDS = st.integers(0, 99)


def weights(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def nibbles(codes: torch.Tensor, count: int) -> np.ndarray:
    """The hexadecimal digits of the bytes: the even element is the first digit."""
    return np.array([int(digit, 16) for digit in codes.numpy().tobytes().hex()])[:count]


def each(values: np.ndarray, count: int) -> np.ndarray:
    """A value per block of 64 → a value per element."""
    return np.repeat(values, 64)[:count]


def absmax(flat: np.ndarray) -> np.ndarray:
    return np.array([np.abs(flat[start : start + 64]).max() for start in range(0, len(flat), 64)], dtype=np.float32)


@given(COUNTS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_int4_is_round_of_w_over_a_seventh_of_absmax_in_twos_complement(count: int, seed: int) -> None:
    flat = weights(count, seed)
    parts = int4.FORMAT.quantize(flat, 64, False)
    scales = absmax(flat.numpy()) / np.float32(7)
    expected = np.rint(np.clip(flat.numpy() / each(scales, count), -7, 7)).astype(int)
    assert np.array_equal(as_float(parts["scales"]).numpy(), scales)
    assert np.array_equal(nibbles(parts["codes"], count), expected & 15)
    restored = int4.FORMAT.dequantize(parts, 64, count, torch.float32)
    assert np.array_equal(restored.numpy(), expected.astype(np.float32) * each(scales, count))


@given(COUNTS, SEEDS)
@settings(max_examples=40, deadline=None)
def test_int8_is_round_of_w_over_a_127th_of_absmax(count: int, seed: int) -> None:
    flat = weights(count, seed)
    parts = int8.FORMAT.quantize(flat, 64, False)
    scales = absmax(flat.numpy()) / np.float32(127)
    expected = np.rint(np.clip(flat.numpy() / each(scales, count), -127, 127))
    assert np.array_equal(as_float(parts["scales"]).numpy(), scales)
    assert np.array_equal(parts["codes"].numpy().view(np.int8), expected)
    restored = int8.FORMAT.dequantize(parts, 64, count, torch.float32)
    assert np.array_equal(restored.numpy(), expected.astype(np.float32) * each(scales, count))


@pytest.mark.parametrize(("format", "table"), [(nf4.FORMAT, NF4), (fp4.FORMAT, FP4)])
@given(count=COUNTS, seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_nf4_and_fp4_pick_the_nearest_entry_of_w_over_absmax(
    format: Format, table: tuple[float, ...], count: int, seed: int
) -> None:
    flat = weights(count, seed)
    parts = format.quantize(flat, 64, False)
    scale = each(absmax(flat.numpy()), count).astype(np.float64)
    distance = np.abs((flat.numpy() / scale)[:, None] - np.array(table))
    chosen = nibbles(parts["codes"], count)
    assert np.array_equal(as_float(parts["scales"]).numpy(), absmax(flat.numpy()))
    assert (distance[np.arange(count), chosen] <= distance.min(axis=1) + 1e-6).all()
    restored = format.dequantize(parts, 64, count, torch.float64)
    assert np.array_equal(restored.numpy(), np.array(table, dtype=np.float32).astype(np.float64)[chosen] * scale)


def test_int4_bytes_of_a_block_done_by_hand() -> None:
    parts = int4.FORMAT.quantize(torch.tensor([7.0, -7.0, 0.0, 1.0, -1.0, 2.4, -3.6]), 64, False)
    assert parts["codes"].numpy().tobytes().hex() == "7901f2c0"
    assert as_float(parts["scales"]).tolist() == [1.0]


def test_nf4_and_fp4_bytes_of_a_block_done_by_hand() -> None:
    """0 is code 7 in nf4 and 0 in fp4; ±absmax are 15 and 0 in nf4, 3 and 11 in fp4."""
    flat = torch.tensor([2.0, -2.0, 0.0, 2.0])
    assert nf4.FORMAT.quantize(flat, 64, False)["codes"].numpy().tobytes().hex() == "f07f"
    assert fp4.FORMAT.quantize(flat, 64, False)["codes"].numpy().tobytes().hex() == "3b03"


def test_int4_nested_scales_are_255ths_of_the_largest() -> None:
    flat = torch.cat([torch.full((64,), 7.0 * step) for step in (51, 102, 255)])
    parts = int4.FORMAT.quantize(flat, 64, True)
    assert parts["scales"].tolist() == [51, 102, 255]
    assert as_float(parts["nested_scales"]).tolist() == [255.0]
    assert torch.equal(int4.FORMAT.dequantize(parts, 64, 192, torch.float32), flat)
