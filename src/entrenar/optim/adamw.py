"""AdamW (Loshchilov and Hutter 2019): PyTorch's fused implementation."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def make_adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """One fused AdamW over parameters or groups of them (optim/groups.py); state is two float32 tensors a parameter."""
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
