"""Schedules against PyTorch's own, step by step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from entrenar.optim.schedule import ScheduleName, learning_rate_factor

_NAMES: tuple[ScheduleName, ...] = ("constant", "linear", "cosine")


def _decay(optimizer: torch.optim.Optimizer, name: ScheduleName, steps: int) -> LRScheduler:
    if name == "constant":
        return ConstantLR(optimizer, factor=1.0)
    if name == "linear":
        return LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    return CosineAnnealingLR(optimizer, T_max=steps)


def _theirs(total: int, warmup: int, name: ScheduleName) -> list[float]:
    """The learning rate of each step from 1.0 at the peak, with linear warm-up that ends at the peak."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = _decay(optimizer, name, total - warmup)
    if warmup:
        rise = LinearLR(optimizer, start_factor=1 / warmup, end_factor=1.0, total_iters=max(warmup - 1, 1))
        optimizer.param_groups[0]["lr"] = 1.0 / warmup
        scheduler = SequentialLR(optimizer, [rise, _decay(optimizer, name, total - warmup)], milestones=[warmup])
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (10, 0), (10, 1), (10, 3), (100, 10), (37, 36)])
def test_every_step_equals_pytorchs_schedule(name: ScheduleName, total: int, warmup: int) -> None:
    ours = [learning_rate_factor(step, total, warmup, name) for step in range(total)]
    assert ours == pytest.approx(_theirs(total, warmup, name), abs=1e-9)


@pytest.mark.parametrize("name", _NAMES)
@settings(max_examples=50)
@given(total=st.integers(1, 500), share=st.floats(0, 1))
def test_no_update_is_wasted_and_none_exceeds_the_peak(name: ScheduleName, total: int, share: float) -> None:
    """The first update already moves, warm-up only rises, the decay never does, and the last update still moves."""
    warmup = int(share * total)
    factors = [learning_rate_factor(step, total, warmup, name) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


@pytest.mark.parametrize(("name", "end"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)])
def test_the_decay_ends_where_it_says(name: ScheduleName, end: float) -> None:
    assert learning_rate_factor(100, 100, 10, name) == pytest.approx(end, abs=1e-12)
    assert learning_rate_factor(10, 100, 10, name) == 1.0
