"""The codebooks against the definitions they follow."""

from statistics import NormalDist

import numpy as np
import pytest
import torch

from entrenar.quant.codebooks import FP4, INT4, NF4, codebook, dynamic_map

CPU = torch.device("cpu")


def test_nf4_is_the_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, appendix E: 8 positive and 7 negative quantiles and 0, divided by the largest."""
    offset, normal = 0.9677083, NormalDist()
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    expected = np.sort([*positive, 0.0, *negative]) / max(positive)
    assert np.abs(np.array(NF4) - expected).max() < 1e-6


def test_int4_is_twos_complement() -> None:
    assert list(INT4) == [code - 16 if code & 8 else code for code in range(16)]


def test_fp4_has_its_sign_in_the_highest_bit() -> None:
    assert [FP4[code ^ 8] for code in range(16)] == [-value for value in FP4]
    assert all(value >= 0 for value in FP4[:8])
    assert FP4[0] == 0.0


@pytest.mark.parametrize(("values", "half_gap"), [(NF4, 0.152), (FP4, 1 / 6)])
def test_the_widest_gap_is_the_formats_error_bound(values: tuple[float, ...], half_gap: float) -> None:
    ordered = np.sort(values)
    assert (ordered[0], ordered[-1]) == (-1.0, 1.0)
    assert half_gap * 0.99 < np.diff(ordered).max() / 2 <= half_gap * (1 + 1e-12)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4"])
def test_a_codebook_is_16_different_float32_values(name: str) -> None:
    table = codebook(name, CPU)
    assert table.dtype == torch.float32
    assert table.shape == (16,)
    assert len(set(table.tolist())) == (15 if name == "fp4" else 16)  # fp4 has a zero of each sign


def test_the_dynamic_map_has_2_to_the_k_midpoints_of_both_signs_in_each_decade() -> None:
    """8-bit Approximations for Parallelism, section 3: fewer bits of fraction for each smaller decade."""
    table = dynamic_map(CPU).double()
    assert table.shape == (256,)
    assert table.diff().min() > 0
    inner = table[(table != 0) & (table != 1)]
    assert torch.equal(inner, -inner.flip(0))
    for exponent in range(7):
        top = 10.0 ** (exponent - 6)
        decade = inner[(inner > top / 10) & (inner < top)]
        step = 0.9 * top / 2**exponent
        expected = top / 10 + step * (torch.arange(2**exponent, dtype=torch.float64) + 0.5)
        assert torch.allclose(decade, expected, rtol=1e-6, atol=0)
