"""Attach adapters to a model: replace the chosen layers by adapted ones and freeze all else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from entrenar.core.errors import InputError, listing
from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.layers.quantized_experts import ExpertProjection
from entrenar.lora.biases import copies_with_trained_bias, train_bias
from entrenar.lora.dora import DoRALayer
from entrenar.lora.embedding import EmbeddingLoRALayer
from entrenar.lora.experts import ExpertLoRALayer
from entrenar.lora.initial import Original, Starter, fresh_start
from entrenar.lora.kinds import incompatible, kind_of
from entrenar.lora.linear_adapter import LinearAdapter
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.matching import (
    ALL_LINEAR,
    Targets,
    allowed,
    has_suffix,
    is_all_linear,
    named_by,
    saved_whole,
    unused,
)
from entrenar.lora.saved import trainable_copies
from entrenar.lora.spec import LoraSpec, config_layers
from entrenar.lora.token_rows import embedding_and_head, is_tied, rows_for, token_rows


def attach_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: Targets = ALL_LINEAR,
    *,
    rslora: bool = False,
    dora: bool = False,
    init: str = "default",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    bias: str = "none",
    modules_to_save: Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    token_indices: Sequence[int] = (),
    original: Original | None = None,
) -> list[str]:
    """Replace the target layers of `model` in place by adapted ones; every other parameter is frozen.

    Args:
        targets: "all-linear" (every linear layer but the output head, and but those whose weight Mamba's kernels use
            outside the layer), a list of name suffixes (`q_proj`,
            `mlp.down_proj`), or another string: a regular expression that must match the whole name, as in peft.
            Embeddings can be named too, and the experts of a mixture (`gate_up_proj`, `down_proj` of `experts`).
        exclude: layers that are left out of the targets, named as these are.
        token_indices: tokens whose rows in embedding and output head are trained, and no others: new ones, for which
            `resize_vocabulary` has made rows.
        rslora, dora, rank_pattern, alpha_pattern, bias, modules_to_save: see `LoraSpec`.
        init: `default`, `gaussian`, `pissa`, `pissa_niter_N`, `loftq` or `loftq_N`, see lora/initial.py.
        original: for pissa and loftq over a quantized base, the weights before that: `original_weights(path)`.

    Returns:
        The full names of the adapted layers.

    Raises:
        InputError: a target that matches nothing (what exists is listed), a rank that does not fit a layer, a choice
            that a layer cannot have, or a model that has adapters already.
    """
    spec = LoraSpec(
        rank=rank, alpha=alpha, dropout=dropout, targets=targets, rslora=rslora, dora=dora, init=init,
        rank_pattern=rank_pattern or {}, alpha_pattern=alpha_pattern or {}, bias=bias, modules_to_save=modules_to_save,
        exclude=exclude, token_indices=rows_for(model, token_indices) if token_indices else {},
    )  # fmt: skip
    return attach(model, spec, original)


def attach(model: nn.Module, spec: LoraSpec, original: Original | None = None) -> list[str]:
    """`attach_lora` for a spec."""
    refuse_adapted(model)
    names = match_targets(model, spec.targets, exclude=spec.exclude, saved=spec.modules_to_save)
    _check_excluded(model, spec.exclude)
    idle = spec.unused_patterns(names)
    if idle:
        raise InputError(f"the rank or alpha pattern {listing(idle)!r} matches no adapted layer")
    replace_modules(model, make_layers(model, spec, names, fresh_start(spec.init, original)))
    return names


def _check_excluded(model: nn.Module, exclude: Targets) -> None:
    """InputError for a word that excludes nothing: in an adapter's config peft passes over it, here it is a typo."""
    paths = [name for name, _ in model.named_modules() if name]
    words: list[Targets] = [exclude] if isinstance(exclude, str) else [[word] for word in exclude]
    idle = [str(word if isinstance(word, str) else word[0]) for word in words if word and not named_by(paths, word)]
    if idle:
        raise InputError(f"lora.exclude: {listing(idle)!r} matches no layer of the model, so it excludes nothing")


def make_layers(model: nn.Module, spec: LoraSpec, names: Sequence[str], start: Starter) -> dict[str, nn.Module]:
    """Module path → what takes its place: adapted layers, copies that are trained whole. The model stays as it is."""
    layers: dict[str, nn.Module] = {
        name: adapt(name, model.get_submodule(name), spec, start).train(model.training) for name in names
    }
    layers |= trainable_copies(model, spec.modules_to_save, names, keeps_ties=spec.keeps_ties)
    layers |= token_rows(model, spec.token_indices, list(layers), keeps_ties=spec.keeps_ties)
    return layers | (copies_with_trained_bias(model, list(layers)) if spec.bias == "all" else {})


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Freeze the model, put modules in their places, and return what was there."""
    before = {name: model.get_submodule(name) for name in modules}
    model.requires_grad_(False)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return before


def refuse_adapted(model: nn.Module) -> None:
    """InputError when the model has adapters already."""
    if any(True for _ in adapted_layers(model)):
        raise InputError("this model has adapters attached already: load it afresh to attach others")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Name and layer of every adapted layer, in the model's order; one that another is made over does not count."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) and not name.startswith(inside):
            inside = (f"{name}.",)
            yield name, module


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of all that is trained."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def match_targets(model: nn.Module, targets: Targets, *, exclude: Targets = (), saved: Sequence[str] = ()) -> list[str]:
    """Full names of the layers that `targets` selects, without excluded ones and what is trained whole (`saved`).

    Raises:
        InputError: see `attach_lora`.
    """
    adaptable = adaptable_names(model)
    if is_all_linear(targets):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        layers = {name: model.get_submodule(name) for name in adaptable}
        left = [n for n, layer in layers.items() if layer is not head and _is_linear(layer) and not _breaks(model, n)]
        chosen, missing = allowed(left, exclude, saved), []
    else:
        named = named_by(adaptable, targets)
        chosen = allowed(named, exclude, saved)
        twice = [name for name in allowed(named, exclude, ()) if name not in chosen]
        if twice:
            raise InputError(f"{listing(twice, 3)} cannot be a target and in modules_to_save: choose one")
        words = [targets] if isinstance(targets, str) else targets
        missing = unused(named, words, has_suffix) if not isinstance(targets, str) else []
        if missing or not named:
            raise _unmatched(model, adaptable, missing or words)
        refuse_breaking(model, chosen)
    if not chosen:
        raise InputError("every LoRA target is excluded or trained whole (modules_to_save): there is nothing to adapt")
    return chosen


def _unmatched(model: nn.Module, adaptable: list[str], targets: Sequence[str]) -> InputError:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedEmbedding) and any(has_suffix(name, target) for target in targets):
            return as_stored_embedding(name)
    known = sorted({name.rpartition(".")[2] for name in adaptable})
    return InputError(
        f"LoRA target {listing(list(targets))!r} matches no linear layer, embedding or experts: the model has "
        f"{listing(known, 20)}"
    )


def as_stored_embedding(name: str) -> InputError:
    """Why an embedding in its file's own blocks has no adapter."""
    return InputError(
        f"{name} is held in its file's own blocks, over which an embedding is not adapted: load the model with "
        "quantize: nf4, which leaves the embedding in floats, or leave it out of the targets"
    )


def expected_layers(model: nn.Module, spec: LoraSpec) -> list[str]:
    """What an adapter's own config says it adapts in this model, by peft's rules; experts are named apart."""
    targets = spec.targets
    if is_all_linear(targets):
        return match_targets(model, targets, exclude=spec.exclude, saved=spec.modules_to_save)
    named = [n for n in adaptable_names(model) if not isinstance(model.get_submodule(n), ExpertProjection)]
    chosen = config_layers(named, spec)
    return [*chosen, *_tied_to(model, chosen, spec)] if spec.keeps_ties else chosen


def _tied_to(model: Any, chosen: Sequence[str], spec: LoraSpec) -> list[str]:
    """The embedding or head whose pair is adapted where the two are to stay tied; both have factors in the file."""
    parts = embedding_and_head(model) if hasattr(model, "get_input_embeddings") else (None, None)
    names = [name for name, module in model.named_modules() if module in parts]
    if None in parts or not is_tied(*parts) or saved_whole(names, spec.modules_to_save):
        return []
    return [name for name in names if name not in chosen] if set(names) & set(chosen) else []


def _breaks(model: nn.Module, name: str) -> bool:
    return name.rpartition(".")[2] in incompatible(model)


def refuse_breaking(model: nn.Module, names: Sequence[str]) -> None:
    """InputError for layers whose weight the architecture's own kernels use outside them: an adapter is not seen."""
    if broken := [name for name in names if _breaks(model, name)]:
        raise InputError(
            f"{listing(broken, 3)} of a {getattr(model.config, 'model_type', 'Mamba')} model cannot be adapted: its "
            "weight is used outside the layer, where an adapter does not reach; leave it out of the targets"
        )


def adaptable_names(model: nn.Module) -> list[str]:
    """Every linear layer and embedding, adapted or not; the parts inside an adapted layer do not count."""
    adapted = tuple(f"{name}." for name, _ in adapted_layers(model))
    return [
        name
        for name, module in model.named_modules()
        if (kind_of(module) or isinstance(module, AdapterLayer)) and not name.startswith(adapted)
    ]


def _is_linear(layer: nn.Module) -> bool:
    kind = kind_of(layer)
    return not isinstance(layer, EmbeddingLoRALayer | ExpertLoRALayer) if kind is None else kind.is_linear


def adapt(name: str, module: nn.Module, spec: LoraSpec, start: Starter) -> AdapterLayer:
    """The adapted layer that takes the place of the module `name`; InputError names it."""
    kind = kind_of(module)
    assert kind is not None  # match_targets yields nothing else
    try:
        layer = kind.adapt(module, spec.for_layer(name))
        if not isinstance(layer, LinearAdapter):
            if spec.dora:
                raise InputError("DoRA is for linear layers: leave it out of the targets")
            if isinstance(layer, ExpertLoRALayer) and spec.init != "default":
                raise InputError(f"experts are not started with {spec.init}: leave init out, or them of the targets")
            return layer
        if not layer.lora_a.is_meta:
            start(name, layer)
    except InputError as error:
        raise InputError(f"cannot adapt {name}: {error}") from None
    if spec.bias != "none":
        train_bias(getattr(layer, "base", layer))
    return DoRALayer(layer) if spec.dora else layer
