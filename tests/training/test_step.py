"""One update: the split into micro-batches does not change it; a non-finite one changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from entrenar.core.memory import anonymous_bytes
from entrenar.data.batches import collate, micro_batches
from entrenar.data.dataset import PreparedData
from entrenar.lora.attach import adapted_layers
from entrenar.optim.adamw import make_adamw
from entrenar.training.step import update
from tests.support.learning import accumulated, learner


def factors(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    return [factor for _, layer in adapted_layers(model) for factor in (layer.lora_a, layer.lora_b)]


def wake_up(model: PreTrainedModel) -> None:
    """Give every B values, so that A has a gradient too."""
    torch.manual_seed(1)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.05)


@pytest.mark.parametrize("micro_batch", [1, 3, 5])
def test_eight_rows_in_pieces_give_the_gradient_of_eight_at_once(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData, micro_batch: int
) -> None:
    wake_up(tiny_qlora)
    rows = tiny_prepared.train.examples[:8]
    whole = accumulated(tiny_qlora, micro_batches(rows, 8, 0))
    expected = [factor.grad.clone() for factor in factors(tiny_qlora) if factor.grad is not None]
    tiny_qlora.zero_grad()
    pieces = accumulated(tiny_qlora, micro_batches(rows, micro_batch, 0))
    got = [factor.grad for factor in factors(tiny_qlora) if factor.grad is not None]
    assert pieces == pytest.approx(whole, abs=1e-6)
    assert len(got) == len(expected) == len(factors(tiny_qlora))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_where_gradients_lie_changes_no_bit_of_them(tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData) -> None:
    """One that a batch gives no gradient to gets none; one that has a gradient already gets the sum."""
    wake_up(tiny_qlora)
    batches, used = micro_batches(tiny_prepared.train.examples[:6], 2, 0), factors(tiny_qlora)
    unused = torch.nn.Parameter(torch.zeros(3))
    found = []
    for parameters in ((), [*used, unused]):
        tiny_qlora.zero_grad()
        for _ in range(2):
            accumulated(tiny_qlora, batches, parameters)
        found.append([factor.grad for factor in used])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert unused.grad is None


def test_loss_is_the_mean_over_all_target_tokens_not_a_mean_of_means(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData
) -> None:
    examples = tiny_prepared.train.examples
    batches = [collate([[row] for row in rows], 0) for rows in (examples[:1], examples[1:6])]
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = tiny_qlora(input_ids=batch.ids).logits[:, :-1]
        labels = batch.ids[:, 1:].masked_fill(~batch.targets[:, 1:], -100)
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none"))
    every = torch.cat(losses)
    assert accumulated(tiny_qlora, batches) == pytest.approx(every.sum().item() / int((every != 0).sum()), rel=1e-5)


def test_update_takes_pytorchs_step_on_the_clipped_gradient(
    tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData
) -> None:
    twin = copy.deepcopy(tiny_qlora)
    batches = micro_batches(tiny_prepared.train.examples[:4], 4, 0)
    optimizer = make_adamw(factors(tiny_qlora), 1.0, (0.9, 0.999), 1e-8, 0.0)
    result = update(learner(tiny_qlora, optimizer), batches, lr=1e-2, max_grad_norm=0.1)
    reference = torch.optim.AdamW(factors(twin), lr=1e-2, weight_decay=0.0)
    accumulated(twin, batches)
    norm = torch.nn.utils.clip_grad_norm_(factors(twin), 0.1)
    reference.step()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    torch.testing.assert_close(factors(tiny_qlora), factors(twin), atol=1e-7, rtol=1e-6)


def test_a_non_finite_gradient_changes_nothing(tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData) -> None:
    layer = next(layer for _, layer in adapted_layers(tiny_qlora))
    layer.lora_b.data.fill_(1e38)
    before = [factor.clone() for factor in factors(tiny_qlora)]
    optimizer = make_adamw(factors(tiny_qlora), 1.0, (0.9, 0.999), 1e-8, 0.0)
    result = update(learner(tiny_qlora, optimizer), micro_batches(tiny_prepared.train.examples[:2], 2, 0), 1.0, 1.0)
    assert not result.is_finite
    assert all(torch.equal(a, b) for a, b in zip(before, factors(tiny_qlora), strict=True))
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())


def test_500_steps_leave_nothing_behind(tiny_qlora: PreTrainedModel, tiny_prepared: PreparedData) -> None:
    """A tensor of the size of a row's hidden states a step would be 7 MB by the end; the heap settles before."""
    optimizer = make_adamw(factors(tiny_qlora), 1e-4, (0.9, 0.999), 1e-8, 0.0)
    batches, before = micro_batches(tiny_prepared.train.examples[:2], 2, 0), 0
    tiny_qlora.train()
    for step in range(750):
        if step == 250:
            before = anonymous_bytes()
        update(learner(tiny_qlora, optimizer), batches, 1e-4, 1.0)
    assert anonymous_bytes() - before < 2 << 20
