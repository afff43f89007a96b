"""Packed = separate: the loss and the adapter's gradients, against transformers running each document by itself."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.data.batches import Batch, micro_batches
from entrenar.data.encode import Example
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from tests.support.alone import CASES, gradients, make_case, separate
from tests.support.learning import accumulated

_CAPACITY = 40


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Run by transformers' own code, and the same with our forwards."""
    plain, fast = make_case(request.param), make_case(request.param)
    use_fast_forwards(fast)
    return plain, fast


def documents(lengths: list[int], seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 96, (length,), generator=draw).tolist() for length in lengths]
    trained = [[*(torch.rand(length, generator=draw) < 0.6).tolist()[:-1], True] for length in lengths]
    return [Example(*row) for row in zip(range(1, len(lengths) + 1), ids, trained, strict=True)]


@settings(deadline=None, max_examples=10)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=2, max_size=8), micro_batch=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_packed_loss_and_gradients_are_those_of_separate_documents(
    models: tuple[PreTrainedModel, PreTrainedModel], lengths: list[int], micro_batch: int, seed: int
) -> None:
    examples = documents(lengths, seed)
    expected_loss, expected = separate(models[0], examples)
    batches = micro_batches(examples, micro_batch, 0, _CAPACITY)
    assert sum(len(batch.ids) for batch in batches) < len(examples)
    for model in models:
        assert accumulated(model, batches) == pytest.approx(expected_loss, rel=1e-6)
        torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-5)


def test_they_would_differ_if_documents_saw_each_other(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """What the test above can find: the same rows as one long document each."""
    batches = micro_batches(documents([9, 12, 7, 10], seed=0), 2, 0, _CAPACITY)
    mixed = [replace(batch, positions=_running(batch)) for batch in batches]
    for model in models:
        assert abs(accumulated(model, mixed) - accumulated(model, batches)) > 1e-3


def _running(batch: Batch) -> Tensor:
    return torch.arange(batch.ids.shape[1]).repeat(len(batch.ids), 1)
