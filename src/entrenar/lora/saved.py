"""Modules that are trained whole beside an adapter: peft's `modules_to_save`.

Each is replaced by a copy of its own, in float32, since a step of 1e-4 is lost in a 16-bit weight; it computes in
float32 and returns the dtype that the model computes in. Weights that were tied stay tied here; peft's adapters undo
that unless they say `ensure_weight_tying`, and are loaded so.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.core.attachment import Attachment
from entrenar.core.errors import InputError, listing
from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.matching import saved_whole, unused

_SAVED_WHOLE = Attachment[bool]("saved_whole")


def trainable_copies(
    model: nn.Module, wanted: Sequence[str], adapted: Sequence[str], *, keeps_ties: bool = True
) -> dict[str, nn.Module]:
    """Module path → its trainable copy, for all modules that `wanted` names (`modules_to_save`, lora/matching.py).

    Args:
        keeps_ties: weights that are tied stay one, so that those tied to a wanted module are copied with it; without
            it (peft's default) each copy is on its own, and what is not named stays the base's.

    Raises:
        InputError: a word that names nothing, a module that is quantized, has no parameters, or is adapted as well.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    named = {name: modules[name] for name in saved_whole(modules, wanted)}
    missing = unused(list(modules), wanted, str.endswith)
    if missing:
        raise InputError(f"modules_to_save has {listing(missing)}, which this model does not have")
    twice = [name for name in adapted if any(name == one or name.startswith(f"{one}.") for one in named)]
    if twice:
        raise InputError(f"{listing(twice, 3)} cannot be a target and in modules_to_save: choose one")
    if not keeps_ties:
        return {name: _trainable(name, module, {}) for name, module in named.items()}
    trained = {id(parameter) for module in named.values() for parameter in module.parameters()}
    tied = {
        name: module
        for name, module in modules.items()
        if name not in named and name not in adapted and any(id(p) in trained for p in module.parameters(recurse=False))
        and not any(name.startswith(f"{one}.") for one in named)
    }  # fmt: skip
    memo: dict[int, Any] = {}
    return {name: _trainable(name, module, memo) for name, module in {**named, **tied}.items()}


def check_saved(model: nn.Module, wanted: Sequence[str], values: Mapping[str, Tensor]) -> None:
    """InputError unless `values` (parameter path → tensor) hold every parameter of the modules that `wanted` names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(parameters[name]) for name in values if name in parameters}
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    inside = tuple(f"{name}." for name in saved_whole(modules, wanted))
    missing = [n for n, p in parameters.items() if n.startswith(inside) and n not in values and id(p) not in tied]
    if missing:
        raise InputError(f"the adapter lacks what its modules_to_save name: {listing(missing, 3)}")


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module of those that are trained whole."""
    return {name: module for name, module in model.named_modules() if is_saved(module)}


def is_saved(module: nn.Module) -> bool:
    """Whether a module is such a copy."""
    return _SAVED_WHOLE.of(module) or False


def _trainable(name: str, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if any(isinstance(part, QuantizedLinear | QuantizedEmbedding) for part in module.modules()):
        raise InputError(f"{name} is quantized, and quantized weights are not trained: leave it out of modules_to_save")
    if not any(True for _ in module.parameters()):
        raise InputError(f"{name} has no parameters to train: leave it out of modules_to_save")
    dtype = next(module.parameters()).dtype
    for parameter in module.parameters():  # the memo gives tied copies one parameter
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(parameter.detach().float().clone(), requires_grad=True)
    copied = copy.deepcopy(module, memo)
    if dtype != torch.float32:
        copied.forward = MethodType(partial(_forward_in_float32, dtype=dtype), copied)
    _SAVED_WHOLE.hang(copied, True)
    return copied


def _forward_in_float32(self: nn.Module, *inputs: Any, dtype: torch.dtype, **options: Any) -> Any:
    wide = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    output = type(self).forward(self, *wide, **options)
    return output.to(dtype) if isinstance(output, Tensor) else output
