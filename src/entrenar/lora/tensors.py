"""What is trained in a model, under the names of an adapter's file: read out, and put back strictly."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.files.peft import AdapterTensors, LayerTensors
from entrenar.files.peft_tensors import ROWS_END
from entrenar.lora.attach import adapted_layers
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.saved import is_saved
from entrenar.lora.token_rows import TokenRows


def adapter_tensors(model: nn.Module) -> AdapterTensors:
    """Detached views of the live parameters."""
    layers: LayerTensors = {
        name: {end: tensor.detach() for end, tensor in layer.file_tensors().items()}
        for name, layer in adapted_layers(model)
    }
    whole = trained_whole(dict(model.named_modules()))
    return AdapterTensors(layers, {name: parameter.detach() for name, parameter in whole.items()})


@torch.no_grad()
def set_tensors(modules: Mapping[str, nn.Module], tensors: AdapterTensors, source: str) -> None:
    """Copy tensors into the adapters among `modules` (path → module), which must be theirs in name and shape."""
    layers = {name: module for name, module in outermost(modules) if isinstance(module, AdapterLayer)}
    targets = {f"{name}.{end}": p for name, layer in layers.items() for end, p in layer.file_tensors().items()}
    values = {f"{name}.{end}": value for name, parts in tensors.layers.items() for end, value in parts.items()}
    _copy(targets, values, source, "adapt the same layers")
    _copy(trained_whole(modules), tensors.saved, source, "train the same parameters whole")


def trained_whole(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameter path → what is trained whole in `modules` (path → module): saved modules, and biases elsewhere.

    A part of a saved module or of an adapted layer counts as that. Tied parameters stand under every name.
    """
    return {
        f"{name}.{leaf}".lstrip("."): parameter
        for name, module in outermost(modules)
        for leaf, parameter in _whole(module).items()
    }


def outermost(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all but those inside an adapted layer or a saved module; parents come first."""
    inside: tuple[str, ...] = ()
    for name, module in modules.items():
        if name.startswith(inside):
            continue
        if is_saved(module) or isinstance(module, AdapterLayer | TokenRows):
            inside = (*inside, f"{name}.")
        yield name, module


def _whole(module: nn.Module) -> dict[str, nn.Parameter]:
    if isinstance(module, TokenRows):  # a head's that are the embedding's are written once
        return {} if module.is_tied else {ROWS_END: module.rows}
    if is_saved(module):
        return dict(module.named_parameters())
    named = module.named_parameters(recurse=isinstance(module, AdapterLayer))
    biases = [p for leaf, p in named if p.requires_grad and leaf.rpartition(".")[2] == "bias"]
    return {"bias": biases[0]} if biases else {}


def _copy(targets: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], source: str, what: str) -> None:
    """Copy values into their parameters; a tied one may stand under each of its names, or one of them."""
    given = {id(targets[name]) for name in values if name in targets}
    odd = sorted({name for name in targets if name not in values and id(targets[name]) not in given}
                 | (values.keys() - targets.keys()))  # fmt: skip
    if odd:
        raise InputError(f"{source} and the model do not {what}: {listing(odd, 3)} only in one of them")
    first: dict[int, str] = {}
    for name, value in values.items():
        target = targets[name]
        if target.shape != value.shape:
            raise InputError(f"{source} has shape {tuple(value.shape)} at {name}, the model {tuple(target.shape)}")
        other = first.setdefault(id(target), name)
        if other != name and not torch.equal(values[other], value):
            raise InputError(f"{source} has other values for {name} than for {other}, which are tied: save it again")
        target.copy_(value)
