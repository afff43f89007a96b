"""Save the adapters of a model as a PEFT directory, and load one onto a model: strict both ways."""

from pathlib import Path

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.files.peft import BaseFormat, PeftAdapter, read_adapter, write_adapter
from entrenar.lora.attach import adapted_layers, attach_lora, match_targets, refuse_adapted
from entrenar.quant.registry import KEPT_FORMATS

Factors = dict[str, tuple[Tensor, Tensor]]


def save_adapter(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters of `model` as a PEFT adapter directory, which must not exist.

    Raises:
        InputError: the model has no adapters, or the directory is taken.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise InputError("this model has no adapters to save: call attach_lora first")
    first = next(iter(layers.values()))
    adapter = PeftAdapter(
        rank=first.rank,
        alpha=first.alpha,
        dropout=first.dropout,
        targets=_short_targets(model, list(layers)),
        base_model=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        base_format=_base_format(model),
        factors=adapter_factors(model),
    )
    write_adapter(Path(directory), adapter)


def load_adapter(model: nn.Module, directory: str | Path) -> None:
    """Attach the adapter of a PEFT directory to `model` and load its factors.

    Raises:
        InputError: a broken directory, or layers, shapes or targets that do not fit the model.
    """
    adapter = read_adapter(Path(directory))
    refuse_adapted(model)
    linear = match_targets(model, r".*")
    unknown = [name for name in adapter.factors if name not in linear]
    if unknown:
        raise InputError(f"the adapter {directory} is for layers this model does not have: {listing(unknown, 3)}")
    _check_shapes(model, adapter, str(directory))
    attach_lora(model, adapter.rank, adapter.alpha, adapter.dropout, list(adapter.factors))
    set_factors(model, adapter.factors, str(directory))


def _check_shapes(model: nn.Module, adapter: PeftAdapter, source: str) -> None:
    """InputError, before anything is attached, unless every factor fits its layer and the adapter's rank."""
    for name, pair in adapter.factors.items():
        layer = model.get_submodule(name)
        wanted = ((adapter.rank, layer.in_features), (layer.out_features, adapter.rank))
        got = tuple(tuple(factor.shape) for factor in pair)
        if got != wanted:
            raise InputError(f"{source} has A and B of shapes {got} at {name}, where the model needs {wanted}")


def adapter_factors(model: nn.Module) -> Factors:
    """Layer path → (A, B), detached views of the live parameters."""
    return {name: (layer.lora_a.detach(), layer.lora_b.detach()) for name, layer in adapted_layers(model)}


@torch.no_grad()
def set_factors(model: nn.Module, factors: Factors, source: str) -> None:
    """Copy factors into the adapters of `model`, which must be exactly theirs in name and shape."""
    layers = dict(adapted_layers(model))
    if layers.keys() != factors.keys():
        odd = sorted(layers.keys() ^ factors.keys())
        raise InputError(f"{source} and the model do not adapt the same layers: {listing(odd, 3)} only in one of them")
    for name, layer in layers.items():
        for target, value in zip((layer.lora_a, layer.lora_b), factors[name], strict=True):
            if target.shape != value.shape:
                raise InputError(f"{source} has shape {tuple(value.shape)} at {name}, the model {tuple(target.shape)}")
            target.copy_(value)


def _base_format(model: nn.Module) -> BaseFormat | None:
    """The format of the first quantized base below an adapter; a model is quantized in one format, or kept as it is."""
    for _, layer in adapted_layers(model):
        weight = getattr(layer, "base_weight_quantized", None)
        if weight is not None:
            name = "keep" if weight.format in KEPT_FORMATS else weight.format
            return BaseFormat(format=name, block_size=weight.block_size, double_quant=weight.is_double_quantized)
    return None


def _short_targets(model: nn.Module, names: list[str]) -> list[str]:
    """The layers' last name components when these select exactly them, else their full names."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    return suffixes if match_targets(model, suffixes) == names else names
