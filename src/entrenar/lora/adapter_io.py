"""Save the adapters of a model as a PEFT directory, and load one onto a model: strict both ways."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.data.feed import Feed, write_feed
from entrenar.files.peft import BaseFormat, LayerTensors, PeftAdapter, read_adapter, write_adapter
from entrenar.files.peft_tensors import A_END, B_END, MAGNITUDE_END, ROWS_END
from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.layers.quantized_experts import ExpertProjection
from entrenar.lora.attach import (
    adaptable_names,
    adapted_layers,
    as_stored_embedding,
    expected_layers,
    make_layers,
    match_targets,
    refuse_adapted,
    refuse_breaking,
    replace_modules,
)
from entrenar.lora.embedding import EmbeddingLoRALayer
from entrenar.lora.experts import ExpertLoRALayer
from entrenar.lora.grown import is_same, make_room
from entrenar.lora.initial import Original, Starter, start_again
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.matching import check_complete, named_by
from entrenar.lora.plain import as_plain
from entrenar.lora.saved import saved_modules
from entrenar.lora.spec import LoraSpec, spec_of
from entrenar.lora.tensors import adapter_tensors, set_tensors
from entrenar.lora.token_rows import TokenRows
from entrenar.quant.registry import AS_STORED_FORMATS


class SavesItself(Protocol):
    """What a tokenizer of transformers is here."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write its files into a directory."""
        ...


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    plain: bool = False,
    tokenizer: SavesItself | None = None,
    feed: Feed | None = None,
) -> None:
    """Write the adapters of `model` as a PEFT adapter directory, which must not exist.

    Args:
        plain: write an adapter that was started with pissa or loftq as plain LoRA of twice the rank over the original
            weights (lora/plain.py), for tools that do not change the base.
        tokenizer: one that has new tokens, to lie beside the adapter.
        feed: how the model was fed in training, to be compared when the adapter is opened (data/feed.py).

    Raises:
        InputError: the model has no adapters, or the directory is taken.
    """
    adapter = adapter_of(model)

    def beside(path: Path) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        if feed is not None:
            write_feed(path, feed)

    write_adapter(Path(directory), as_plain(adapter) if plain else adapter, beside)


def load_adapter(model: nn.Module, directory: str | Path, *, original: Original | None = None) -> None:
    """Attach the adapter of a PEFT directory to `model` and load its tensors.

    Args:
        original: as for `attach_lora`; needed where an initialisation changed the base and that is quantized.

    Raises:
        InputError: a broken directory, or layers, shapes or targets that do not fit the model.
    """
    refuse_adapted(model)
    adapter = read_adapter(Path(directory))
    make_room(model, adapter, str(directory))
    replace_modules(model, layers_of(model, adapter, str(directory), start_again(adapter, original)))


def adapter_of(model: nn.Module) -> PeftAdapter:
    """The adapter of a model as it would stand on disk; its tensors are views of the live parameters."""
    layers = dict(adapted_layers(model))
    if not layers:
        raise InputError("this model has no adapters to save: call attach_lora first")
    experts = [name for name, layer in layers.items() if isinstance(layer, ExpertLoRALayer)]
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    saved, tensors = saved_modules(model), adapter_tensors(model)
    return PeftAdapter(
        rank=rank,
        alpha=alpha,
        dropout=max(layer.dropout for layer in layers.values()),
        targets=_short_targets(model, [name for name in layers if name not in experts]),
        target_parameters=_short_targets(model, experts),
        base_model=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        base_format=_base_format(layers),
        rslora=any(layer.rslora for layer in layers.values()),
        dora=any(MAGNITUDE_END in parts for parts in tensors.layers.values()),
        init=next((layer.start for layer in layers.values() if layer.taken is not None), True),
        bias=_bias(tensors.saved, saved, layers),
        rank_pattern={name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        alpha_pattern={name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        modules_to_save=sorted(saved),
        token_indices=_token_indices(model),
        keeps_ties=_has_ties(saved),
        fan_in_fan_out=any(layer.is_transposed and not _is_embedding(layer) for layer in layers.values()),
        tensors=tensors,
        taken=_taken(layers),
    )


def layers_of(model: nn.Module, adapter: PeftAdapter, source: str, start: Starter) -> dict[str, nn.Module]:
    """Module path → what takes its place, filled with the adapter's tensors; the model stays as it is."""
    spec = spec_of(adapter)
    _check_names(model, adapter, spec, source)
    _check_base(model, adapter.tensors.base, source)
    replaced = make_layers(model, spec, list(adapter.tensors.layers), start)
    _check_shapes(replaced, adapter, source)
    set_tensors(replaced, adapter.tensors, source)
    return replaced


def _check_names(model: nn.Module, adapter: PeftAdapter, spec: LoraSpec, source: str) -> None:
    """InputError unless the adapter has factors for exactly the layers that its config names, and these are here."""
    names, modules = list(adapter.tensors.layers), dict(model.named_modules(remove_duplicate=False))
    known = set(adaptable_names(model))
    for name in names:
        if name not in known and isinstance(modules.get(name), QuantizedEmbedding):
            raise as_stored_embedding(name)
        if name not in known and name in modules:
            kind = type(modules[name]).__name__
            raise InputError(f"the adapter {source} is for {name}, a {kind}, over which no adapter is laid here")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"the adapter {source} is for layers this model does not have: {listing(unknown, 3)}")
    refuse_breaking(model, names)
    experts = [name for name in known if isinstance(modules[name], ExpertProjection)]
    expected = [*expected_layers(model, spec), *named_by(experts, adapter.target_parameters)]
    check_complete(names, expected, f"the adapter {source}")


def _check_shapes(replaced: Mapping[str, nn.Module], adapter: PeftAdapter, source: str) -> None:
    """InputError unless every pair of factors fits its layer and the adapter's rank."""
    for name, parts in adapter.tensors.layers.items():
        layer = replaced[name]
        assert isinstance(layer, AdapterLayer)
        ends = list(layer.file_tensors())[:2]
        wanted = (tuple(layer.lora_a.shape), tuple(layer.lora_b.shape))
        got = tuple(tuple(parts[end].shape) for end in ends if end in parts)
        if got != wanted:
            raise InputError(f"{source} has A and B of shapes {got} at {name}, where the model needs {wanted}")


def _check_base(model: nn.Module, base: Mapping[str, Tensor], source: str) -> None:
    """InputError when the base's own weights, which peft writes beside an adapted embedding, are not the model's."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in base.items():
        weight = parameters.get(name)
        if weight is None or not is_same(weight, tensor):
            raise InputError(f"{source} was trained on another base: its {name} is not this model's")


def _base_format(layers: Mapping[str, AdapterLayer]) -> BaseFormat | None:
    """The format of the first quantized base below an adapter; a model is quantized in one format, or kept as it is."""
    for layer in layers.values():
        weight = getattr(getattr(layer, "plain", layer), "base_weight_quantized", None)
        if weight is not None:
            return BaseFormat(
                format="keep" if weight.format in AS_STORED_FORMATS else weight.format,
                block_size=weight.block_size,
                double_quant=weight.is_double_quantized,
                search=weight.searched,
            )
    return None


def _bias(trained: Mapping[str, Tensor], saved: Mapping[str, nn.Module], layers: Mapping[str, AdapterLayer]) -> str:
    """Which of peft's words says what biases are trained beside `saved` modules."""
    inside = tuple(f"{path}." for path in saved)
    owners = {
        name.rpartition(".")[0] for name in trained if not name.startswith(inside) and not name.endswith(ROWS_END)
    }
    if not owners:
        return "none"
    return "lora_only" if owners <= layers.keys() else "all"


def _has_ties(saved: Mapping[str, nn.Module]) -> bool:
    """Whether two modules that are trained whole share a parameter."""
    parameters = [id(parameter) for module in saved.values() for parameter in module.parameters()]
    return len(set(parameters)) < len(parameters)


def _token_indices(model: nn.Module) -> dict[str, list[int]]:
    """End of a module's name → tokens whose rows are trained."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, TokenRows)}
    return {name.rpartition(".")[2]: module.indices for name, module in modules.items() if not module.is_tied}


def _is_embedding(layer: AdapterLayer) -> bool:
    return isinstance(layer, EmbeddingLoRALayer)


def _taken(layers: Mapping[str, AdapterLayer]) -> LayerTensors:
    """What initialisations took out of the base."""
    return {
        name: {A_END: layer.taken[0], B_END: layer.taken[1]}
        for name, layer in layers.items()
        if layer.taken is not None
    }


def _short_targets(model: nn.Module, names: list[str]) -> list[str]:
    """The layers' last name components when these select exactly them, else their full names."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    return suffixes if names and match_targets(model, suffixes) == names else names
