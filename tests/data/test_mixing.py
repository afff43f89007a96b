"""Which rows make up a mixed set: counts against a count in fractions, and every row about equally often."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.core.errors import InputError
from entrenar.data.mixing import choose, row_counts
from entrenar.data.sources import Source

WEIGHTS = st.floats(0.25, 8, allow_nan=False)


@given(st.integers(1, 60), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_every_row_comes_equally_often_but_for_one(size: int, count: int, seed: int) -> None:
    rows = choose(size, count, seed, "train|0")
    times = Counter(rows)
    assert len(rows) == count
    assert set(rows) <= set(range(size))
    assert {times[row] for row in range(size)} <= {count // size, -(-count // size)}
    assert rows == choose(size, count, seed, "train|0")


def test_the_choice_follows_the_seed_and_the_stream_and_keeps_the_order_of_the_rows() -> None:
    choices = [tuple(choose(1000, 100, seed, stream)) for seed in (0, 1) for stream in ("train|0", "train|1")]
    assert len(set(choices)) == 4
    assert all(sorted(choice) == list(choice) for choice in choices)
    # Uniform: the mean of 100 of 0 … 999 without repeats is 499.5 ± 27.4.
    assert all(abs(sum(choice) / 100 - 499.5) < 5 * 27.4 for choice in choices)


def test_all_rows_once_are_the_rows_in_their_order() -> None:
    assert choose(7, 7, 3, "train|0") == list(range(7))
    assert choose(0, 0, 3, "train|0") == []


@given(st.lists(st.tuples(WEIGHTS, st.integers(20, 400)), min_size=1, max_size=6))
def test_weights_share_the_rows_of_all(pairs: list[tuple[float, int]]) -> None:
    counts = row_counts([Source(path="x", weight=weight) for weight, _ in pairs], [size for _, size in pairs])
    total = sum(size for _, size in pairs)
    assert sum(counts) == total
    for count, (weight, _) in zip(counts, pairs, strict=True):
        share = total * Fraction(weight) / sum(Fraction(other) for other, _ in pairs)
        assert abs(count - share) < 1


def test_numbers_of_rows_and_weights_of_0_stand_apart_from_the_shares() -> None:
    entries = [Source(path=path, **measure) for path, measure in {
        "a": {"weight": 3.0}, "b": {"weight": 1.0}, "c": {"rows": 7}, "d": {"weight": 0.0},
    }.items()]  # fmt: skip
    assert row_counts(entries, [10, 90, 1000, 0]) == [75, 25, 7, 0]
    assert row_counts([Source(path="a"), Source(path="b", rows=5)], [10, 2]) == [10, 5]


@pytest.mark.parametrize(
    ("sources", "sizes", "sentence"),
    [
        ([{"weight": 1e-9}, {"weight": 1}], [10, 10], r"gives no row with weight 1e-09: raise it"),
        ([{"weight": 1}, {"weight": 1}], [0, 10], r"leaves no row to take"),
        ([{"rows": 3}], [0], r"leaves no row to take"),
    ],
)
def test_an_entry_that_cannot_give_its_share_is_an_error(
    sources: list[dict[str, float]], sizes: list[int], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        row_counts([Source.model_validate({"path": "x", **source}) for source in sources], sizes)
