"""Packed = separate: the loss and the adapter's gradients, against transformers running each document by itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.data.batches import Batch, micro_batches
from entrenar.data.encode import Example
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from tests.support.families import FAMILIES, make_family
from tests.support.learning import accumulated

_CAPACITY = 40


# Sliding windows are 5 tokens in most families: shorter than a document. Here also longer, and in every layer.
CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in FAMILIES},
    "mistral, window 64": {"sliding_window": 64},
    "phi3, window 5": {"sliding_window": 5},
}


def make(case: str) -> PreTrainedModel:
    """With adapters whose A and B both have gradients; the same every time."""
    model = make_family(case.partition(",")[0], initializer_range=0.05, **CASES[case])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        attach_lora(model, rank=4, alpha=8)
        for _, layer in adapted_layers(model):
            torch.nn.init.normal_(layer.lora_b, std=0.1)
    return model


@pytest.fixture(scope="module", params=CASES)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Run by transformers' own code, and the same with our forwards."""
    plain, fast = make(request.param), make(request.param)
    use_fast_forwards(fast)
    return plain, fast


def documents(lengths: list[int], seed: int) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 96, (length,), generator=draw).tolist() for length in lengths]
    trained = [[*(torch.rand(length, generator=draw) < 0.6).tolist()[:-1], True] for length in lengths]
    return [Example(*row) for row in zip(range(1, len(lengths) + 1), ids, trained, strict=True)]


def gradients(model: PreTrainedModel) -> list[Tensor]:
    factors = [factor for _, layer in adapted_layers(model) for factor in (layer.lora_a, layer.lora_b)]
    found = [factor.grad.clone() for factor in factors if factor.grad is not None]
    assert len(found) == len(factors) > 0
    model.zero_grad()
    return found


def separate(model: PreTrainedModel, examples: list[Example]) -> tuple[float, list[Tensor]]:
    """The mean loss over all trained tokens, each document alone, by transformers' plain forward pass."""
    losses = []
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = ids[0, 1:].masked_fill(~torch.tensor(example.trained[1:]), -100)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
    loss = torch.stack(losses).sum() / sum(sum(example.trained[1:]) for example in examples)
    loss.backward()
    return loss.item(), gradients(model)


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
