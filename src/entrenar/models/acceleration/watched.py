"""What a module's class asks its module for, seen in a run of its own forward over parts that stand for the module's.

Numbers on a few inputs cannot show what a forward does elsewhere; a forward that takes one tensor, asks for nothing but
a weight and an epsilon and decides nothing by what it is given can do little else.
"""

import inspect
from collections.abc import Mapping
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@cache
def takes_one_tensor(kind: type) -> bool:
    """Whether the class's forward takes one argument beside the module, and no more if it is given more."""
    try:
        parameters = list(inspect.signature(inspect.getattr_static(kind, "forward")).parameters.values())
    except (AttributeError, TypeError, ValueError):
        return False
    return len(parameters) == 2 and parameters[1].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


@torch.no_grad()
def outcome_over(module: nn.Module, parts: Mapping[str, Any], x: Tensor, *, constants: bool = False) -> Tensor | None:
    """What the class's forward makes of x when `parts` stand for the module's; None if that cannot be told from them.

    It cannot if the forward raises, gives no tensor, leaves a part aside, asks the module for something else or writes
    to it, or decides by the values that it is given what to do.

    Args:
        constants: whether the module's plain numbers may be asked for too, but for `training`.
    """
    log = _Log(module, parts, constants)
    try:
        with _NoDecisions():
            outcome = type(module).forward(_Watched(log), x)  # pyright: ignore[reportArgumentType]
    except Exception:  # it takes something else, or asks for more
        return None
    return outcome if isinstance(outcome, Tensor) and log.asked == parts.keys() and not log.more else None


class _Log:
    """What a forward asked for: of the parts, and beyond them."""

    def __init__(self, module: nn.Module, parts: Mapping[str, Any], constants: bool) -> None:
        self.module, self.parts, self.constants = module, parts, constants
        self.asked, self.more = set[str](), set[str]()

    def give(self, watched: "_Watched", name: str) -> Any:
        """The attribute of a name: a part, a method of the class, or a constant."""
        if name in self.parts:
            self.asked.add(name)
            return self.parts[name]
        method = inspect.getattr_static(type(self.module), name, None)
        if inspect.isfunction(method):
            return MethodType(method, watched)
        value = getattr(self.module, name)
        if self.constants and isinstance(value, int | float | tuple) and name != "training":
            return value
        return self.refuse(name)

    def refuse(self, name: str) -> None:
        """Note it, and end the run; not by an AttributeError, which `hasattr` would turn into an answer."""
        self.more.add(name)
        raise RuntimeError(f"the forward asks for {name}")


class _Watched:
    """The module, as the forward sees it."""

    def __init__(self, log: _Log) -> None:
        object.__setattr__(self, "_log", log)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "_log").give(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        object.__getattribute__(self, "_log").refuse(name)


class _NoDecisions(TorchDispatchMode):
    """Refuses to turn a tensor's values into a Python value, by which a forward could choose between two ways."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal):
            raise RuntimeError("the forward decides by the values it is given")
        return func(*args, **(kwargs or {}))
