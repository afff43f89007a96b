"""Forwards that are swapped: which modules of a model have a faster one, and how to take them out again.

`nn.Module` calls the `forward` of the instance before its class's. A swapped forward is a `FastForward` bound to its
module there; parameters, children and place stay the module's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from entrenar.models.acceleration import attention

_SWITCH = "_attn_implementation"


class FastForward:
    """A forward that stands for a class's own: called with the module, then as that is called."""

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """What the class's own forward gives."""
        raise NotImplementedError


def swap(module: nn.Module, forward: FastForward) -> None:
    """Give the module that forward."""
    module.forward = MethodType(forward, module)


def fast_forward_of(module: nn.Module) -> FastForward | None:
    """The module's faster forward; None if it has none."""
    function = getattr(vars(module).get("forward"), "__func__", None)
    return function if isinstance(function, FastForward) else None


def swapped(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module that has a faster forward."""
    return {name: module for name, module in model.named_modules() if fast_forward_of(module) is not None}


def restore(model: PreTrainedModel) -> None:
    """Let every module run its class's own forward again, and PyTorch attend."""
    for module in swapped(model).values():
        del vars(module)["forward"]
    if getattr(model.config, _SWITCH) == attention.NAME:
        model.set_attn_implementation("sdpa")


@contextmanager
def own_way(model: PreTrainedModel) -> Iterator[None]:
    """Let every module run its class's own forward meanwhile."""
    forwards = {module: vars(module)["forward"] for module in swapped(model).values()}
    attention_name = getattr(model.config, _SWITCH)
    restore(model)
    try:
        yield
    finally:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        if attention_name != getattr(model.config, _SWITCH):
            model.set_attn_implementation(attention_name)
