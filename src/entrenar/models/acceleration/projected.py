"""The forward of an attention class of transformers over parts that are computed already, and with another rotation."""

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor

_ROTARY = "apply_rotary_pos_emb"
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k, cos, sin → q, k


def rotating_by(forward: Any, rotate: Rotate) -> FunctionType | None:
    """The same forward with another rotation in place of its module's; None if it does not call one."""
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    names = {**vars(sys.modules[forward.__module__]), _ROTARY: rotate}
    changed = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


class Stand:
    """A module some of whose attributes are others; the rest are its own."""

    def __init__(self, module: Any, **parts: Any) -> None:
        self._module = module
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Projected(Stand):
    """An attention module whose projections of its input are known; what `parts` does not replace is its own."""

    def __init__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, **parts: Any) -> None:
        super().__init__(module, q_proj=lambda _: q, k_proj=lambda _: k, v_proj=lambda _: v, **parts)


def module_of(module: Any) -> Any:
    """The module itself, given it or a stand for it."""
    return module._module if isinstance(module, Stand) else module
