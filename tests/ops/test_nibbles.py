"""Two codes a byte: byte = 16 · even + odd."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.ops.codebook.nibbles import pack_nibbles, unpack_nibbles

CODES = st.lists(st.integers(0, 15), max_size=140)


def as_codes(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@given(values=CODES, spare=st.integers(0, 15))
@settings(max_examples=100, deadline=None)
def test_the_even_element_is_the_high_nibble_and_an_odd_count_leaves_the_spare(values: list[int], spare: int) -> None:
    padded = values + [spare] * (len(values) % 2)
    expected = [16 * even + odd for even, odd in zip(padded[::2], padded[1::2], strict=True)]
    packed = pack_nibbles(as_codes(values), spare)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected


@given(CODES)
@settings(max_examples=100, deadline=None)
def test_unpacking_undoes_packing(values: list[int]) -> None:
    codes = unpack_nibbles(pack_nibbles(as_codes(values)), len(values))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == values


def test_every_byte_unpacks_to_its_two_hexadecimal_digits() -> None:
    digits = "".join(f"{byte:02x}" for byte in range(256))
    codes = unpack_nibbles(torch.arange(256, dtype=torch.uint8), 512)
    assert codes.tolist() == [int(digit, 16) for digit in digits]
