"""Adapted models of every family, and what documents that stand alone give by transformers' plain forward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.data.encode import Example
from entrenar.lora.attach import adapted_layers, attach_lora
from tests.support.families import FAMILIES, make_family

# Sliding windows are 5 tokens in most families: shorter than a document. Here also longer, and in every layer.
CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in FAMILIES},
    "mistral, window 64": {"sliding_window": 64},
    "phi3, window 5": {"sliding_window": 5},
}


def make_case(case: str) -> PreTrainedModel:
    """With adapters whose A and B both have gradients; the same every time."""
    model = make_family(case.partition(",")[0], initializer_range=0.05, **CASES[case])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        attach_lora(model, rank=4, alpha=8)
        for _, layer in adapted_layers(model):
            torch.nn.init.normal_(layer.lora_b, std=0.1)
    return model


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
