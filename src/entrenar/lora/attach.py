"""Attach adapters to a model: replace the chosen linear layers by LoRA or QLoRA layers and freeze all else."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from entrenar.core.errors import InputError, listing
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.qlora_layer import QLoRALayer
from entrenar.quant.linear import QuantizedLinear

ALL_LINEAR = "all-linear"


def attach_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = ALL_LINEAR,
) -> list[str]:
    """Replace the target layers of `model` in place by adapted ones; every other parameter is frozen.

    Args:
        targets: "all-linear" (every linear layer but the output head), a list of name suffixes (`q_proj`,
            `mlp.down_proj`), or another string: a regular expression that must match the whole name, as in peft.

    Returns:
        The full names of the adapted layers.

    Raises:
        InputError: a target that matches nothing (what exists is listed), a rank that does not fit a layer, or a
            model that has adapters already.
    """
    refuse_adapted(model)
    names = match_targets(model, targets)
    adapted = {name: _adapt(name, model.get_submodule(name), rank, alpha, dropout) for name in names}
    for name, layer in adapted.items():  # only now: an error above leaves the model as it was
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    model.requires_grad_(False)
    for _, layer in adapted_layers(model):
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
    return names


def refuse_adapted(model: nn.Module) -> None:
    """InputError when the model has adapters already."""
    if any(True for _ in adapted_layers(model)):
        raise InputError("this model has adapters attached already: load it afresh to attach others")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Name and layer of every adapted layer, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name, module


def match_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that `targets` selects; see `attach_lora`."""
    linear = _linear_names(model)
    if targets == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return [name for name in linear if model.get_submodule(name) is not head]
    if isinstance(targets, str):
        chosen = _by_regex(linear, targets)
        missing = [] if chosen else [targets]
    else:
        chosen = [name for name in linear if any(_has_suffix(name, target) for target in targets)]
        missing = [target for target in targets if not any(_has_suffix(name, target) for name in linear)]
    if missing or not chosen:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise InputError(
            f"LoRA target {listing(missing)!r} matches no linear layer: the model has {listing(known, 20)}"
        )
    return chosen


def _linear_names(model: nn.Module) -> list[str]:
    """Every linear layer, adapted or not; the parts inside an adapted layer do not count."""
    adapted = tuple(f"{name}." for name, _ in adapted_layers(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear | AdapterLayer) and not name.startswith(adapted)
    ]


def _by_regex(names: list[str], pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"LoRA target {pattern!r} is not a regular expression: {error}") from None
    return [name for name in names if compiled.fullmatch(name)]


def _has_suffix(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _adapt(name: str, module: nn.Module, rank: int, alpha: float, dropout: float) -> nn.Module:
    try:
        if isinstance(module, QuantizedLinear):
            layer: nn.Module = QLoRALayer(module.quantized_weight, rank, alpha, dropout, module.bias)
        else:
            assert isinstance(module, nn.Linear)  # match_targets yields nothing else
            layer = LoRALayer(module.weight, rank, alpha, dropout, module.bias)
    except InputError as error:
        raise InputError(f"cannot adapt {name}: {error}") from None
    return layer.train(module.training)
