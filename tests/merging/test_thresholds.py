"""Thresholds are those a sort finds, whatever a sample says of them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.merging import stack as stacks
from entrenar.merging import thresholds
from entrenar.merging.stack import MemoryReader, Scratch, Stack
from entrenar.merging.thresholds import largest
from entrenar.ops.merge.masks import magnitude_bits

N, PIECE, SAMPLES, SAMPLE = 60_000, 4096, 16, 512


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors are sampled."""
    monkeypatch.setattr(stacks, "PIECE_ELEMENTS", PIECE)
    monkeypatch.setattr(stacks, "SAMPLES", SAMPLES)
    monkeypatch.setattr(stacks, "SAMPLE_ELEMENTS", SAMPLE)


def of_one(x: Tensor, base: Tensor | None, counts: list[int]) -> list[tuple[int, int]]:
    """(bits, ties) of every k."""
    source = None if base is None else MemoryReader(base)
    stack = Stack(
        name="t", shape=(len(x),), models=[MemoryReader(x)], base=source, labels=["a"], scratch=Scratch()
    )  # fmt: skip
    (found,) = largest(stack, lambda piece: [(piece.models[0], piece.base)], [counts])
    return [(one.bits, one.ties) for one in found]


def sorted_out(x: Tensor, base: Tensor | None, counts: list[int]) -> list[tuple[int, int]]:
    """The same by a sort."""
    bits = magnitude_bits(x, base).sort(descending=True).values
    values = [int(bits[k - 1]) for k in counts]
    return [(value, k - int((bits > value).sum())) for value, k in zip(values, counts, strict=True)]


def normal(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def sampled(n: int) -> Tensor:
    """Whether each element is in the sample."""
    inside = torch.zeros(n, dtype=torch.bool)
    for start in range(0, n // SAMPLES * SAMPLES, n // SAMPLES):
        inside[start : start + SAMPLE] = True
    return inside


def never(*_: object) -> None:
    pytest.fail("the whole tensor was counted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_good_sample_spares_the_counting(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, base = normal().to(dtype), normal(seed=1).to(dtype)
    counts = [1, N // 10, N // 2, N - 1, N]
    monkeypatch.setattr(thresholds, "_counted", never)
    assert of_one(x, base, counts) == sorted_out(x, base, counts)


BLIND = {
    "smaller": lambda x: torch.where(sampled(len(x)), x / 100, x),
    "larger": lambda x: torch.where(sampled(len(x)), x * 100, x),
    "constant": lambda x: torch.full_like(x, 0.5),
    "zeros": torch.zeros_like,
    "all but one": lambda x: torch.zeros_like(x).index_fill_(0, torch.tensor([N // 2 + 700]), 3.0),
    "rows apart": lambda x: x * torch.arange(len(x)).div(3000, rounding_mode="floor"),
    "not finite": lambda x: torch.where(torch.arange(len(x)) % 7 == 0, torch.nan, x),
}


@pytest.mark.parametrize("change", BLIND.values(), ids=BLIND)
def test_a_sample_that_misleads_changes_nothing(change: Callable[[Tensor], Tensor]) -> None:
    x, counts = change(normal()), [1, 100, N // 3, N // 2, N - 5, N]
    assert of_one(x, None, counts) == sorted_out(x, None, counts)


def test_a_sample_that_misleads_costs_the_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "_counted", lambda *_: [["counted"]])
    stack = Stack(
        name="t", shape=(N,), models=[MemoryReader(BLIND["smaller"](normal()))], base=None, labels=["a"],
        scratch=Scratch(),
    )  # fmt: skip
    assert largest(stack, lambda piece: [(piece.models[0], None)], [[N // 2]]) == [["counted"]]


def test_of_nothing_nothing_is_kept() -> None:
    ((bits, ties),) = of_one(normal(), None, [0])
    assert (bits, ties) == (0x7FFFFFFF, 0)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 3 * SAMPLES * SAMPLE),
    share=st.floats(0.0, 1.0),
    levels=st.sampled_from([1, 2, 50, 10**6]),
    seed=st.integers(0, 5),
)
def test_any_size_and_any_number_of_equals(n: int, share: float, levels: int, seed: int) -> None:
    x = (normal(n, seed) * levels).round() / levels
    counts = [max(1, round(share * n))]
    assert of_one(x, None, counts) == sorted_out(x, None, counts)
