"""Biases that are trained beside an adapter: peft's `bias: lora_only` and `all`."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn


def train_bias(owner: nn.Module) -> None:
    """Give the owner of a bias, if it has one, a trained float32 copy of it; its layer must cast it when it is used."""
    bias = owner.bias
    if isinstance(bias, Tensor):
        owner.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=True)


def copies_with_trained_bias(model: nn.Module, replaced: Sequence[str]) -> dict[str, nn.Module]:
    """Module path → a copy with a bias of its own that is trained; all its other parameters are shared and frozen.

    Modules that are `replaced` already, and what lies inside them, are left out. The bias keeps its dtype: PyTorch's
    layers take no other.
    """
    inside = tuple(f"{name}." for name in replaced)
    return {
        name: _copy(module)
        for name, module in model.named_modules()
        if isinstance(module._parameters.get("bias"), Tensor) and name not in replaced and not name.startswith(inside)
    }


def _copy(module: nn.Module) -> nn.Module:
    bias = module.get_parameter("bias")
    shared = {id(parameter): parameter for parameter in module.parameters() if parameter is not bias}
    copied = copy.deepcopy(module, dict(shared))
    copied.bias = nn.Parameter(bias.detach().clone(), requires_grad=True)
    return copied
