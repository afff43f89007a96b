"""What is trained in a model, under the names of an adapter's file: read out, and put back strictly."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.files.peft import AdapterTensors, LayerTensors
from entrenar.lora.attach import adapted_layers
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.saved import is_saved
from entrenar.lora.token_rows import ROWS, TokenRows


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
        return {} if module.is_tied else {ROWS: module.rows}
    if is_saved(module):
        return dict(module.named_parameters())
    named = module.named_parameters(recurse=isinstance(module, AdapterLayer))
    biases = [p for leaf, p in named if p.requires_grad and leaf.rpartition(".")[2] == "bias"]
    return {"bias": biases[0]} if biases else {}


def _copy(targets: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], source: str, what: str) -> None:
    if targets.keys() != values.keys():
        odd = sorted(targets.keys() ^ values.keys())
        raise InputError(f"{source} and the model do not {what}: {listing(odd, 3)} only in one of them")
    for name, target in targets.items():
        if target.shape != values[name].shape:
            shapes = f"shape {tuple(values[name].shape)} at {name}, the model {tuple(target.shape)}"
            raise InputError(f"{source} has {shapes}")
        target.copy_(values[name])
