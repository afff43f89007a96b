"""The plan: fastest first, never over its budget, the leanest when asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.layers.recompute import Recompute
from entrenar.planning.memory_plan import Activations, Fixed, MemoryPlan, make_memory_plan

FIXED = Fixed(libraries=300_000_000, base=600_000_000, adapter=50_000_000, gradients=50_000_000, optimizer=100_000_000)
LADDER = {Recompute.NOTHING: 1_600_000, Recompute.CHEAP: 900_000, Recompute.ALL: 200_000}
ACTIVATIONS = Activations(layers=22, saved=LADDER, logits=64_000_000, scratch=20_000_000)
TOKENS = {1: 512, 2: 1024, 4: 2048}


def plan(budget: int | None, *, smallest: bool = False) -> MemoryPlan:
    return make_memory_plan(FIXED, ACTIVATIONS, TOKENS, budget, smallest=smallest)


def test_without_a_bound_nothing_is_given_up() -> None:
    found = plan(None)
    assert found.micro_batch == 4
    assert found.recompute == (Recompute.NOTHING,) * 22
    assert found.sentence().endswith("4 rows at a time; nothing is computed twice")


def test_the_leanest_keeps_inputs_alone_of_one_row() -> None:
    found = plan(None, smallest=True)
    assert found.micro_batch == 1
    assert set(found.recompute[:-1]) == {Recompute.ALL}
    assert found.total == min(plan(budget).total for budget in range(0, 10**10, 10**8))


@given(st.integers(10**9, 10**10))
def test_less_memory_is_never_faster_and_what_can_fit_fits(budget: int) -> None:
    found, more = plan(budget), plan(budget + 10**8)
    assert found.fits == (plan(None, smallest=True).total <= budget)
    assert not found.fits or (found.total <= budget and found.time >= more.time)


def test_layers_give_up_one_by_one_the_first_ones_first() -> None:
    mixed = [plan(budget).recompute for budget in range(13 * 10**8, 4 * 10**9, 10**7)]
    assert len(set(mixed)) > 10
    order = list(LADDER)
    for keep in mixed:
        rungs = [order.index(choice) for choice in keep]
        assert rungs == sorted(rungs, reverse=True)


def test_giving_up_a_little_in_all_layers_comes_before_giving_up_all_in_some() -> None:
    for budget in range(13 * 10**8, 4 * 10**9, 10**7):
        assert not {Recompute.NOTHING, Recompute.ALL} <= set(plan(budget).recompute)


@pytest.mark.parametrize("keep", LADDER)
def test_the_total_is_the_sum_of_its_parts(keep: Recompute) -> None:
    one = Activations(layers=22, saved={keep: LADDER[keep]}, logits=64_000_000, scratch=20_000_000)
    found = make_memory_plan(FIXED, one, {2: 1024}, None)
    assert found.total == found.fixed.total + found.saved + found.transient
    assert found.saved == pytest.approx(1024 * LADDER[keep] * 1.15)


def test_a_model_whose_layers_cannot_be_told_has_one_choice() -> None:
    found = make_memory_plan(
        FIXED, Activations(layers=0, saved={Recompute.NOTHING: 10}, logits=1, scratch=0), {1: 8}, budget=1
    )
    assert found.recompute == ()
    assert not found.fits
