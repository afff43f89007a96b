"""Groups of an optimiser; against peft in tests/interop/test_peft_optimizer.py."""

import torch
from torch import nn

from entrenar.optim.groups import LR_RATIO, lora_plus_groups

NAMES = {"q.lora_a": 2, "q.lora_b": 2, "q.magnitude": 1, "embed.lora_a": 2, "embed.lora_b": 2, "norm.weight": 1}
PARAMETERS = {name: nn.Parameter(torch.zeros([2] * dim)) for name, dim in NAMES.items()}
EMBEDDING = ("embed.lora_a", "embed.lora_b")


def ratios(ratio: float, embedding_ratio: float) -> dict[str, float]:
    groups = lora_plus_groups(PARAMETERS.items(), ratio, EMBEDDING, embedding_ratio)
    names = {id(parameter): name for name, parameter in PARAMETERS.items()}
    return {names[id(parameter)]: group[LR_RATIO] for group in groups for parameter in group["params"]}


def test_lora_plus_has_three_rates() -> None:
    assert ratios(16, 0.005) == {
        "q.lora_a": 1, "q.lora_b": 16, "q.magnitude": 16, "embed.lora_a": 0.005, "embed.lora_b": 0.005,
        "norm.weight": 16,
    }  # fmt: skip


def test_without_lora_plus_all_have_one_rate() -> None:
    assert set(ratios(1, 0.005).values()) == {1}
