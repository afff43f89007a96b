"""Modules that are trained whole beside an adapter: peft's `modules_to_save`.

Each is replaced by a copy of its own, in float32, since a step of 1e-4 is lost in a 16-bit weight; it computes in
float32 and returns the dtype that the model computes in. Weights that were tied stay tied.
"""

import copy
from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.quant.embedding import QuantizedEmbedding
from entrenar.quant.linear import QuantizedLinear

_MARK = "_entrenar_saved"


def trainable_copies(model: nn.Module, suffixes: Sequence[str], adapted: Sequence[str]) -> dict[str, nn.Module]:
    """Module path → its trainable copy, for all that `suffixes` name and all whose weights are tied to one of those.

    Raises:
        InputError: a suffix that names nothing, a module that is quantized, has no parameters, or is adapted as well.
    """
    named = {name: module for name, module in model.named_modules() if any(_has_suffix(name, s) for s in suffixes)}
    missing = [suffix for suffix in suffixes if not any(_has_suffix(name, suffix) for name in named)]
    if missing:
        raise InputError(f"modules_to_save has {listing(missing)}, which this model does not have")
    twice = [name for name in adapted if any(name == one or name.startswith(f"{one}.") for one in named)]
    if twice:
        raise InputError(f"{listing(twice, 3)} cannot be a target and in modules_to_save: choose one")
    own = {id(parameter) for module in named.values() for parameter in module.parameters()}
    tied = {
        name: module
        for name, module in model.named_modules()
        if name not in named and name not in adapted and any(id(p) in own for p in module.parameters(recurse=False))
        and not any(name.startswith(f"{one}.") for one in named)
    }  # fmt: skip
    memo: dict[int, Any] = {}
    return {name: _trainable(name, module, memo) for name, module in {**named, **tied}.items()}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of those that are trained whole."""
    return {name: module for name, module in model.named_modules() if is_saved(module)}


def is_saved(module: nn.Module) -> bool:
    """Whether a module is such a copy."""
    return getattr(module, _MARK, False)


def _trainable(name: str, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if any(isinstance(part, QuantizedLinear | QuantizedEmbedding) for part in module.modules()):
        raise InputError(f"{name} is quantized, and quantized weights are not trained: leave it out of modules_to_save")
    if not any(True for _ in module.parameters()):
        raise InputError(f"{name} has no parameters to train: leave it out of modules_to_save")
    dtype = next(module.parameters()).dtype
    for parameter in module.parameters():  # the memo gives tied copies one parameter
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(parameter.detach().float().clone(), requires_grad=True)
    made = copy.deepcopy(module, memo)
    if dtype != torch.float32:
        made.forward = MethodType(partial(_forward_in_float32, dtype=dtype), made)
    setattr(made, _MARK, True)
    return made


def _forward_in_float32(self: nn.Module, *inputs: Any, dtype: torch.dtype, **options: Any) -> Any:
    wide = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    output = type(self).forward(self, *wide, **options)
    return output.to(dtype) if isinstance(output, Tensor) else output


def _has_suffix(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")
