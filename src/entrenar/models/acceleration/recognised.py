"""What a module computes, told by its class and then by numbers; and what fast_forwards.py recognised it as.

The class decides first: what its forward takes, and what it reads off the module. Then known numbers stand for the
module's parts, and the forward's outcome must be that of one hypothesis, every element in float32 or float64, and
plainly not that of another.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from entrenar.layers.residual_blocks import Norm
from entrenar.models.acceleration.agreement import told_apart
from entrenar.models.acceleration.class_source import reads, takes_one_tensor
from entrenar.models.acceleration.projected import Stand
from entrenar.ops.gated_activation import KINDS, gated_activation

_OFFSETS = (0.0, 1.0)  # Llama's norm, Gemma's
_WEIGHTS = (0.0, -1.0, 1.0, 0.5, -2.0, 30.0, 1e-3, -0.999, -0.5)  # where one offset could pass for another, and between
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_FLOOR = 1e-6  # of an activation: some are made of float32's cancelling halves


def keywords_of(module: nn.Module, kind: str) -> dict[str, Any] | None:
    """The parameters of the forward called `kind` that a module was given; None if it has no such forward."""
    forward = getattr(vars(module).get("forward"), "__func__", None)
    return forward.keywords if isinstance(forward, partial) and forward.func.__name__ == kind else None


def norm_of(module: nn.Module) -> Norm | None:
    """The RMS norm a module was recognised as."""
    found = keywords_of(module, "norm_forward")
    return None if found is None else Norm(cast(Any, module).weight, found["eps"], found["offset"])


def activation_of(module: nn.Module) -> str | None:
    """The kind of a gated MLP's activation, if the module was recognised as one."""
    found = keywords_of(module, "gated_mlp_forward")
    return None if found is None else found["kind"]


@torch.no_grad()
def norm_kind(module: nn.Module) -> tuple[float, float] | None:
    """Epsilon and offset of a module that is an RMS norm of its last dimension and nothing else; else None."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float) or not eps >= 0:
        return None
    if not _has_only(module, "weight") or not _reads_weight_and_constants(module):
        return None
    own = weight.detach().to("cpu", torch.float32)
    planted = torch.tensor(_WEIGHTS).repeat(len(own) // len(_WEIGHTS) + 1)[: len(own)]
    found = {_offset_told(module, each, eps) for each in (own, planted)}
    (offset, *others) = found
    return None if others or offset is None else (eps, offset)


def _offset_told(module: nn.Module, weight: Tensor, eps: float) -> float | None:
    x = _norm_inputs(len(weight), eps)
    try:
        outcome = type(module).forward(cast(Any, Stand(module, weight=weight)), x)
    except Exception:  # it takes something else: not the module it looked like
        return None
    if not isinstance(outcome, Tensor):
        return None
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    chosen = told_apart(outcome, [normed * (weight.double() + offset) for offset in _OFFSETS])
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
    held = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return held == [*names] and not any(module.children())


def _reads_weight_and_constants(module: nn.Module) -> bool:
    kind = type(module)
    names = reads(kind) if takes_one_tensor(kind) else None
    if names is None or "weight" not in names or "training" in names:
        return False
    return all(isinstance(getattr(module, name, None), int | float | tuple) for name in names - {"weight"})


@torch.no_grad()
def gated_mlp_kind(module: nn.Module) -> str | None:
    """The activation of a module that is down_proj(act(gate_proj(x)) · up_proj(x)) and nothing else; else None."""
    kind = type(module)
    function = getattr(module, "act_fn", None)
    layers = (getattr(module, name, None) for name in sorted(_MLP_PARTS - {"act_fn"}))
    if not all(isinstance(layer, nn.Module) for layer in layers) or activation_kind(function) is None:
        return None
    if not takes_one_tensor(kind) or reads(kind) != _MLP_PARTS:
        return None
    x, gate = torch.ones(1, 1, 2, dtype=torch.float64), _all_over()[None, None]
    up = gate[..., torch.randperm(gate.shape[-1], generator=torch.Generator().manual_seed(0))]
    taken: list[Any] = []

    def given(result: Tensor) -> Any:
        return lambda value: taken.append(value) or result

    stand = SimpleNamespace(gate_proj=given(gate), up_proj=given(up), down_proj=lambda y: y, act_fn=function)
    outcome = kind.forward(cast(Any, stand), x)
    kinds = list(KINDS)
    made = [gated_activation(gate, up, each) for each in kinds]
    chosen = told_apart(outcome, [*made, *(gated_activation(up, gate, each) for each in kinds)], 50 * _FLOOR)
    same = len(taken) == 2 and all(each is x for each in taken)
    return kinds[chosen] if same and chosen is not None and chosen < len(kinds) else None


@torch.no_grad()
def activation_kind(function: Any) -> str | None:
    """Which gated activation a function is: as numbers say, over all the range where kinds differ, and far outside,
    where some are clipped."""
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
    chosen = told_apart(outcome, [gated_activation(x, torch.ones_like(x), kind) for kind in kinds], _FLOOR)
    return None if chosen is None else kinds[chosen]


def _all_over() -> Tensor:
    """Numbers of both signs, dense around 0, up to 10,000: (1001,) float64."""
    near, far = torch.linspace(-12, 12, 801, dtype=torch.float64), torch.logspace(1, 4, 100, dtype=torch.float64)
    return torch.cat((near, far, -far))
