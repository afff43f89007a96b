"""What a norm, a gated MLP or an activation computes, tried on planted numbers.

Known numbers stand for the module's parts while its class's own forward runs. It may ask for those parts and nothing
else (watched.py), and its outcome must be that of one hypothesis, every element in float32 or float64, and plainly not
that of another. Names serve to reach the parts (`weight`, `gate_proj`); what they do is tried.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.models.acceleration.agreement import only_match
from entrenar.models.acceleration.watched import outcome_over, takes_one_tensor
from entrenar.ops.elementwise.gated_activation import KINDS, gated_activation

_OFFSETS = (0.0, 1.0)  # Llama's norm, Gemma's
_WEIGHTS = (0.0, -1.0, 1.0, 0.5, -2.0, 30.0, 1e-3, -0.999, -0.5)  # where one offset could pass for another, and between
_MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")
_FLOOR = 1e-6  # of an activation: some are made of float32's cancelling halves


@torch.no_grad()
def norm_kind(module: nn.Module) -> tuple[float, float] | None:
    """Epsilon and offset of a module that is an RMS norm of its last dimension and nothing else; else None."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or not eps >= 0:
        return None
    if not _has_only(module, "weight") or not takes_one_tensor(type(module)):
        return None
    trained = weight.detach().to("cpu", torch.float32)
    planted = torch.tensor(_WEIGHTS).repeat(len(trained) // len(_WEIGHTS) + 1)[: len(trained)]
    (offset, *others) = {_offset_seen(module, tried, eps) for tried in (trained, planted)}
    return None if others or offset is None else (eps, offset)


def _offset_seen(module: nn.Module, weight: Tensor, eps: float) -> float | None:
    x = _norm_inputs(len(weight), eps)
    outcome = outcome_over(module, {"weight": weight}, x, constants=True)
    if outcome is None:
        return None
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    chosen = only_match(outcome, [normed * (weight.double() + offset) for offset in _OFFSETS])
    return None if chosen is None else _OFFSETS[chosen]


def _norm_inputs(features: int, eps: float) -> Tensor:
    """Rows (1, 6, features) that set norms apart: far from 0 in the mean, large, uneven, and where eps decides."""
    x = torch.randn(6, features, generator=torch.Generator().manual_seed(features))
    x[1] += 3
    x[2] *= 1e4
    x[3, : features // 2] *= 100
    x[4:] *= torch.tensor([[1.0], [0.1]]) * max(eps, 1e-12) ** 0.5
    return x[None]


def _has_only(module: nn.Module, *names: str) -> bool:
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return tensors == [*names] and not any(module.children())


@torch.no_grad()
def gated_mlp_kind(module: nn.Module) -> str | None:
    """The activation of a module that is down_proj(act(gate_proj(x)) · up_proj(x)) and nothing else; else None."""
    function = getattr(module, "act_fn", None)
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in _MLP_LAYERS):
        return None
    if activation_kind(function) is None or not takes_one_tensor(type(module)):
        return None
    x, gate = torch.ones(1, 1, 2, dtype=torch.float64), _all_over()[None, None]
    up = gate[..., torch.randperm(gate.shape[-1], generator=torch.Generator().manual_seed(0))]
    inputs: list[Any] = []

    def giving(result: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda value: inputs.append(value) or result

    layers = {"gate_proj": giving(gate), "up_proj": giving(up), "down_proj": lambda y: y}
    outcome = outcome_over(module, layers | {"act_fn": function}, x)
    if outcome is None or len(inputs) != 2 or any(value is not x for value in inputs):
        return None
    kinds = list(KINDS)
    right = [gated_activation(gate, up, kind) for kind in kinds]
    swapped = [gated_activation(up, gate, kind) for kind in kinds]
    chosen = only_match(outcome, [*right, *swapped], 50 * _FLOOR)
    return kinds[chosen] if chosen is not None and chosen < len(kinds) else None


@torch.no_grad()
def activation_kind(function: Any) -> str | None:
    """Which gated activation a function is, over all the range where kinds differ and far outside, where some are
    clipped; None for any other."""
    if isinstance(function, nn.Module) and (list(function.parameters()) or list(function.buffers())):
        return None  # what it computes may change
    x = _all_over()
    try:
        outcome = function(x)
    except Exception:  # none, or one that takes more than a tensor
        return None
    if not isinstance(outcome, Tensor):
        return None
    kinds = list(KINDS)
    chosen = only_match(outcome, [gated_activation(x, torch.ones_like(x), kind) for kind in kinds], _FLOOR)
    return None if chosen is None else kinds[chosen]


def _all_over() -> Tensor:
    """Numbers of both signs, dense around 0, up to 10,000: (1001,) float64."""
    near, far = torch.linspace(-12, 12, 801, dtype=torch.float64), torch.logspace(1, 4, 100, dtype=torch.float64)
    return torch.cat((near, far, -far))
