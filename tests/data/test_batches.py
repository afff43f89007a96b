"""Batches are a pure function of (seed, index), use every row once an epoch, and keep documents apart."""

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data.batches import batch_rows, batches_per_epoch, collate, micro_batches
from entrenar.data.encode import Example

_ROWS, _SIZES, _SEEDS = st.integers(1, 60), st.integers(1, 17), st.integers(0, 2**31)
_EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=12
).map(lambda rows: [Example(n, [i for i, _ in row], [flag for _, flag in row]) for n, row in enumerate(rows, start=1)])


def _epoch(rows: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    count = batches_per_epoch(rows, size)
    return [batch_rows(rows, size, seed, epoch * count + within) for within in range(count)]


@given(rows=_ROWS, size=_SIZES, seed=_SEEDS, epoch=st.integers(0, 3))
def test_every_row_is_used_exactly_once_an_epoch(rows: int, size: int, seed: int, epoch: int) -> None:
    batches = _epoch(rows, size, seed, epoch)
    assert sorted(chain.from_iterable(batches)) == list(range(rows))
    assert all(len(batch) == size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size


@given(rows=_ROWS, size=_SIZES, seed=_SEEDS, index=st.integers(0, 50))
def test_a_batch_depends_on_nothing_but_its_arguments(rows: int, size: int, seed: int, index: int) -> None:
    first = batch_rows(rows, size, seed, index)
    torch.manual_seed(index)
    torch.rand(3)
    batch_rows(rows, size, seed, index + 1)
    assert batch_rows(rows, size, seed, index) == first


@given(seed=_SEEDS, index=st.integers(0, 50))
def test_drawing_a_batch_leaves_the_global_generator_alone(seed: int, index: int) -> None:
    before = torch.get_rng_state()
    batch_rows(40, 4, seed, index)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(chain.from_iterable(_epoch(50, 5, seed, epoch))) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert tuple(range(50)) not in orders


def test_documents_share_a_row_with_positions_of_their_own() -> None:
    a, b = Example(7, [5, 6, 7], [False, True, True]), Example(3, [8, 4], [True, True])
    batch = collate([[a, b], [b]], pad_id=9)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 4], [8, 4, 9, 9, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch.targets.tolist() == [[False, True, True, False, True], [False, True, False, False, False]]
    assert (batch.ids.dtype, batch.positions.dtype, batch.targets.dtype) == (torch.int64, torch.int64, torch.bool)
    assert (batch.lines, batch.target_count, batch.token_count) == ((7, 3, 3), 4, 7)


@pytest.mark.parametrize("pad_id", [0, 50])
@given(examples=_EXAMPLES, pack_to=st.sampled_from([0, 9, 20]), size=st.integers(1, 5))
def test_documents_come_back_out_of_a_batch(pad_id: int, examples: list[Example], pack_to: int, size: int) -> None:
    """Cut where positions restart; the pad id may itself be a token of the text."""
    found = {}
    for batch in micro_batches(examples, size, pad_id, pack_to):
        lines = iter(batch.lines)
        for ids, positions, targets in zip(batch.ids, batch.positions, batch.targets, strict=True):
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
            for start, end in pairwise(starts):
                assert positions[start:end].tolist() == list(range(end - start))
                found[next(lines)] = (ids[start:end].tolist(), targets[start:end].tolist())
        assert next(lines, None) is None
    assert sorted(found) == [example.line for example in examples]
    for example in examples:
        ids, targets = found[example.line]
        rest = len(ids) - len(example)
        assert ids == example.ids + [pad_id] * rest
        assert targets == [False, *example.trained[1:]] + [False] * rest


@given(examples=_EXAMPLES, pack_to=st.sampled_from([0, 9, 20]), size=st.integers(1, 5))
def test_micro_batches_hold_the_same_rows_and_targets(examples: list[Example], pack_to: int, size: int) -> None:
    whole, parts = collate([[example] for example in examples], 0), micro_batches(examples, size, 0, pack_to)
    assert sorted(chain.from_iterable(part.lines for part in parts)) == sorted(whole.lines)
    assert sum(part.target_count for part in parts) == whole.target_count
    assert sum(part.token_count for part in parts) == whole.token_count
    assert all(len(part.ids) <= size for part in parts)
    assert all(part.ids.shape[1] <= max(pack_to, *map(len, examples), 1) for part in parts)
