"""The rotation that an attention module of transformers calls by a name of its own module."""

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
