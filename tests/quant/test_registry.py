"""The registry: every format by name, and the block sizes that are allowed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrenar.core.errors import InputError
from entrenar.quant.registry import BLOCK_SIZES, FORMATS, check_block_size, get_format


def test_a_row_stands_under_its_own_name() -> None:
    assert [row.name for row in FORMATS.values()] == list(FORMATS)
    assert set(FORMATS) >= {"int4", "nf4", "fp4", "int8"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_holds_as_many_bits_a_code_as_it_says(name: str) -> None:
    row = get_format(name)
    parts = row.quantize(torch.ones(1024), 64, False)
    assert parts["codes"].numel() * 8 == row.bits * 1024


@pytest.mark.parametrize("name", ["", "NF4", "q4", "int2"])
def test_an_unknown_format_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InputError) as caught:
        get_format(name)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in FORMATS)


def test_the_block_sizes_are_the_powers_of_two_from_16_to_4096() -> None:
    assert BLOCK_SIZES == (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    for size in BLOCK_SIZES:
        check_block_size(size)


@given(st.integers(-100, 10_000).filter(lambda size: size not in BLOCK_SIZES))
def test_any_other_block_size_is_an_error_that_says_which_are_allowed(size: int) -> None:
    with pytest.raises(InputError, match=rf"block size {size} .*16 to 4096"):
        check_block_size(size)
