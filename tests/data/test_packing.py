"""Packing: every document once, no row beyond the capacity, few rows, the same on every machine."""

import random
from collections.abc import Callable
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data.packing import ENOUGH, MicroBatch, best_fit, computed_tokens, layout, level, pack

Pack = Callable[[list[int], int], MicroBatch]
_LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
_CAPACITY = st.integers(60, 200)


def _totals(rows: MicroBatch, lengths: list[int]) -> list[int]:
    return [sum(lengths[index] for index in row) for row in rows]


def _optimum(lengths: list[int], capacity: int) -> int:
    """Fewest rows, by trying every partition."""

    def tried(index: int, rows: list[int]) -> int:
        if index == len(lengths):
            return len(rows)
        into = [tried(index + 1, [*rows[:r], rows[r] + lengths[index], *rows[r + 1 :]])
                for r in range(len(rows)) if rows[r] + lengths[index] <= capacity]  # fmt: skip
        return min([*into, tried(index + 1, [*rows, lengths[index]])])

    return tried(0, [])


@pytest.mark.parametrize("method", [best_fit, pack])
@given(lengths=_LENGTHS, capacity=_CAPACITY)
def test_every_document_is_in_one_row_and_no_row_overflows(method: Pack, lengths: list[int], capacity: int) -> None:
    rows = method(lengths, capacity)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(0 < total <= capacity for total in _totals(rows, lengths))
    assert len(pack(lengths, capacity)) == len(best_fit(lengths, capacity))


@given(lengths=_LENGTHS, capacity=_CAPACITY)
def test_no_two_rows_would_fit_into_one(lengths: list[int], capacity: int) -> None:
    """True of any fit that opens a row only when it must; it bounds the waste to half of everything."""
    totals = sorted(_totals(best_fit(lengths, capacity), lengths))
    assert all(a + b > capacity for a, b in pairwise(totals))


@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=7), capacity=st.integers(10, 20))
def test_best_fit_decreasing_keeps_its_proven_bound(lengths: list[int], capacity: int) -> None:
    """Johnson et al. 1974, theorem 2.3: at most 11/9 of the fewest possible rows, and 4."""
    assert len(best_fit(lengths, capacity)) <= 11 / 9 * _optimum(lengths, capacity) + 4


def test_the_fullest_row_with_room_is_taken_and_ties_go_by_index() -> None:
    assert best_fit([5, 6, 3, 4, 3], 10) == [[1, 3], [0, 2], [4]]
    assert best_fit([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]


@given(lengths=_LENGTHS, count=st.integers(1, 12))
def test_levelled_rows_differ_by_one_document_at_most(lengths: list[int], count: int) -> None:
    rows = level(lengths, count)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    lowest = min(_totals(rows, lengths))
    assert all(sum(lengths[i] for i in row) - lengths[row[-1]] <= lowest for row in rows if row)


def test_a_half_empty_last_row_is_levelled_away() -> None:
    assert _totals(best_fit([30] * 4, 100), [30] * 4) == [90, 30]
    assert _totals(pack([30] * 4, 100), [30] * 4) == [60, 60]


@given(lengths=_LENGTHS, micro_batch=st.integers(1, 5))
def test_without_packing_every_document_has_a_row_and_like_lengths_meet(lengths: list[int], micro_batch: int) -> None:
    groups = layout(lengths, micro_batch, 0)
    assert all(len(row) == 1 for rows in groups for row in rows)
    order = [lengths[row[0]] for rows in groups for row in rows]
    assert order == sorted(lengths, reverse=True)
    assert [len(rows) for rows in groups[:-1]] == [micro_batch] * (len(groups) - 1)


@given(lengths=_LENGTHS, micro_batch=st.integers(1, 5), capacity=_CAPACITY)
def test_a_micro_batch_computes_no_more_than_its_rows_times_the_capacity(
    lengths: list[int], micro_batch: int, capacity: int
) -> None:
    groups = layout(lengths, micro_batch, capacity)
    for rows in groups:
        assert len(rows) <= micro_batch
        assert computed_tokens([rows], lengths) == len(rows) * max(_totals(rows, lengths)) <= micro_batch * capacity


@pytest.mark.parametrize(("longest", "pack_to", "expected"), [(64, 4096, ENOUGH), (2000, 4096, 2000), (64, 128, 128)])
def test_rows_are_as_long_as_a_document_needs_and_attention_likes(longest: int, pack_to: int, expected: int) -> None:
    lengths = [longest, *[64] * 127]
    rows = [row for rows in layout(lengths, 4, pack_to) for row in rows]
    assert max(_totals(rows, lengths)) == expected


def test_packing_leaves_little_padding_where_rows_vary() -> None:
    """Sixteen log-normal rows a batch: without packing nearly half is padding."""
    draw = random.Random(0)
    useful = []
    for pack_to in (0, 1024):
        tokens = computed = 0
        for _ in range(20):
            lengths = [min(round(draw.lognormvariate(4.5, 0.8)), 512) for _ in range(16)]
            tokens += sum(lengths)
            computed += computed_tokens(layout(lengths, 8, pack_to), lengths)
        useful.append(tokens / computed)
    assert useful[0] < 0.7
    assert useful[1] > 0.95
