"""What an activation is, and what fast_forwards.py recognised a module as, read back off the forward it gave it."""

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from entrenar.ops.gated_activation import KINDS, gated_activation
from entrenar.ops.residual_blocks import Norm


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


def activation_kind(function: Any) -> str | None:
    """Which gated activation a function is: as numbers say, over all the range where kinds differ."""
    x = torch.linspace(-8, 8, 401)
    try:
        expected = function(x)
    except Exception:  # none, or one that takes more than a tensor
        return None
    ones = torch.ones_like(x)
    return next((kind for kind in KINDS if torch.allclose(gated_activation(x, ones, kind), expected, atol=1e-6)), None)
