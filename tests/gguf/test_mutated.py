"""GGUF files with a few numbers of the header wrong: refused in one sentence, or read as the file they were."""

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from entrenar.core.errors import InputError
from entrenar.opening.load import load

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _numbers(content: bytes) -> list[tuple[int, int]]:
    """(place, bytes) of every number of the header, of arrays the first elements."""
    found, at = [], 4

    def number(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int.from_bytes(content[at - size : at], "little")

    def text() -> None:
        nonlocal at
        size = number(8)
        at += size

    number(4)
    tensors, keys = number(8), number(8)
    for _ in range(keys):
        text()
        kind = number(4)
        element, count = (number(4), number(8)) if kind == 9 else (kind, 1)
        before = len(found)
        for _ in range(count):
            if element == 8:
                text()
            else:
                number(_SIZES[element])
        del found[before + 3 :]
    for _ in range(tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found


def _mutated(content: bytes, places: list[tuple[int, int]], source: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(source.choice((1, 1, 2))):
        at, size = source.choice(places)
        old, top = int.from_bytes(content[at : at + size], "little"), (1 << 8 * size) - 1
        near = (0, 1, 2, 7, old + 1, old - 1, old * 2, old // 2, old + 32, old - 32, top, top >> 1)
        new = source.choice((*near, old ^ 1 << source.randrange(8 * size), source.randrange(top + 1)))
        changed[at : at + size] = (new & top).to_bytes(size, "little")
    return bytes(changed)


def test_a_header_with_wrong_numbers_is_refused_or_its_weights_are_those_of_the_file(
    make_gguf: Callable[..., Path],
) -> None:
    """In bounded time. (tests/interop asks llama.cpp about the keys that were changed.)"""
    path = make_gguf("F16")
    content, source = path.read_bytes(), random.Random(19)
    weights = load(str(path), "none", dtype="float32")[0].state_dict()
    places, refused = _numbers(content), 0
    for _ in range(150):
        path.write_bytes(_mutated(content, places, source))
        start = time.process_time()
        try:
            model, tokenizer = load(str(path), "none", dtype="float32")
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            tokenizer("Hello 12")
            for name, weight in model.state_dict().items():
                assert weight.shape == weights[name].shape
                assert torch.equal(weight, weights[name])
        assert time.process_time() - start < 2
    assert refused > 75


@pytest.mark.parametrize("count", [2**16, 2**31, 2**32 - 1])
def test_layers_that_are_not_there_cost_no_time(make_gguf: Callable[..., Path], count: int) -> None:
    path = make_gguf()
    content = path.read_bytes()
    key = b"llama.block_count" + struct.pack("<I", 4)
    at = content.index(key) + len(key)
    path.write_bytes(content[:at] + struct.pack("<I", count) + content[at + 4 :])
    start = time.process_time()
    with pytest.raises(InputError, match=r"layers|block_count"):
        load(str(path))
    assert time.process_time() - start < 2
