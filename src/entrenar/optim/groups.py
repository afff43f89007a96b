"""What an optimiser treats alike: LoRA+'s two learning rates (Hayou et al. 2024, section 4)."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

LR_RATIO = "lr_ratio"  # key of a group: its learning rate as a multiple of the schedule's


def lora_plus_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    ratio: float,
    embedding: Collection[str] = (),
    embedding_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Name and parameter of all that is trained → groups, as peft's `create_loraplus_optimizer` has them: A and whole
    matrices at the schedule's rate; B, and vectors (magnitudes, biases), at `ratio` times it; both factors of adapted
    embeddings, whose names are in `embedding`, at `embedding_ratio` times it. With a ratio of 1 it is no LoRA+, and all
    have one rate."""
    slow, fast, rows = [], [], []
    for name, parameter in parameters:
        is_fast = name.endswith("lora_b") or parameter.dim() == 1
        (rows if name in embedding and ratio != 1 else fast if is_fast else slow).append(parameter)
    groups = zip((slow, rows, fast), (1.0, embedding_ratio, ratio), strict=True)
    return [{"params": params, LR_RATIO: times} for params, times in groups if params]
