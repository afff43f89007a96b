"""What an optimiser treats alike: LoRA+'s two learning rates (Hayou et al. 2024, section 4)."""

from collections.abc import Iterable
from typing import Any

from torch import nn

LR_RATIO = "lr_ratio"  # key of a group: its learning rate as a multiple of the schedule's


def lora_plus_groups(parameters: Iterable[tuple[str, nn.Parameter]], ratio: float) -> list[dict[str, Any]]:
    """Name and parameter of all that is trained → groups: A and whole matrices at the schedule's rate; B, and vectors
    (magnitudes, biases), at `ratio` times it, as peft's `create_loraplus_optimizer` has them."""
    slow, fast = [], []
    for name, parameter in parameters:
        is_fast = name.endswith("lora_b") or parameter.dim() == 1
        (fast if is_fast else slow).append(parameter)
    groups = [{"params": slow, LR_RATIO: 1.0}, {"params": fast, LR_RATIO: ratio}]
    return [group for group in groups if group["params"]]
