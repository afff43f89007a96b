"""What fast_forwards.py recognised a module as, read back off the forward it gave it."""

from functools import partial
from typing import Any, cast

from torch import nn

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
