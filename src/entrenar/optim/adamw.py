"""AdamW (Loshchilov and Hutter 2019): PyTorch's fused implementation."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def make_adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """One fused AdamW over parameters or groups of them (optim/groups.py); state is two float32 tensors a parameter.

    The state is made here. Made after the first backward, as PyTorch does, it would fill what the first step's
    activations left free, and the second step's would need as much again: 0.1 GB more for a 1.1B model.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = _fresh_state(parameter)
    return optimizer


def adamw_state_bytes(parameters: Sequence[nn.Parameter]) -> int:
    """Two moments like each parameter, and a float32 step counter."""
    return sum(2 * parameter.numel() * parameter.element_size() + 4 for parameter in parameters)


def _fresh_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """What torch.optim.AdamW makes of a parameter that it meets for the first time."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
