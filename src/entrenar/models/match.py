"""A source's tensors against a model's parameters: the same names, shapes and kinds, or an error that says which."""

import torch
from transformers import PreTrainedModel

from entrenar.core.errors import InputError, listing
from entrenar.files.stored_tensor import StoredTensor
from entrenar.models.experts import PROJECTIONS, expert_modules, expert_weights, file_name
from entrenar.models.source import ModelSource


def match_tensors(model: PreTrainedModel, source: ModelSource) -> dict[str, StoredTensor]:
    """The source's tensor for each parameter, in the order of the files; a tied parameter may have none.

    Under transformers' names, but those of a mixture's blocks as the files have them (models/experts.py). Of a weight
    that the source holds quantized (`ModelSource.packed`) it is the tensor of its codes.

    Raises:
        InputError: a parameter without a tensor or the reverse, a shape or dtype that does not fit, or a tied tensor
            with values of its own.
    """
    _check_names(model, source)
    names, packed = set(source.weights.names()), source.packed.packed() if source.packed else {}
    found: dict[str, StoredTensor] = {}
    for name, shape in _wanted(model, names).items():
        if name in names:
            found[name] = source.weights.stored(name)
            if name not in packed:
                _check_fits(f"{source.path}: {name}", found[name], shape)
            elif packed[name][1] != shape:
                raise InputError(f"{source.path}: {name} has shape {packed[name][1]} but the config says {shape}")
    _check_tied(model, source)
    return dict(sorted(found.items(), key=lambda item: (str(item[1].file.path), item[1].start)))


def _wanted(model: PreTrainedModel, have: set[str]) -> dict[str, tuple[int, ...]]:
    """Name of every tensor that files which have the tensors `have` should have → its shape."""
    experts = expert_weights(model, have)
    fused = {f"{path}.{name}" for path in expert_modules(model) for name in PROJECTIONS}
    plain = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in fused}
    return {file_name(name, have): shape for name, shape in plain.items()} | {n: e.shape for n, e in experts.items()}


def _check_names(model: PreTrainedModel, source: ModelSource) -> None:
    """InputError unless the source has exactly the model's parameters (a tied head may be there or not)."""
    have = set(source.weights.names())
    wanted = _wanted(model, have).keys()
    optional = set(_tied_names(model)) | {name for name in have if name.endswith("rotary_emb.inv_freq")}
    missing, unexpected = sorted(wanted - have - optional), sorted(have - wanted - optional)
    if missing:
        raise InputError(f"{source.path} lacks {len(missing)} tensors of {type(model).__name__}: {listing(missing, 5)}")
    if unexpected:
        raise InputError(
            f"{source.path} has {len(unexpected)} tensors that {type(model).__name__} lacks: {listing(unexpected, 5)}"
        )


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head shares the embedding's storage."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Tied parameter → the one whose storage it shares."""
    return dict(model._tied_weights_keys or {}) if is_tied(model) else {}


def _check_tied(model: PreTrainedModel, source: ModelSource) -> None:
    """InputError when the source holds a tied tensor with values of its own: one of the two would be lost."""
    have = set(source.weights.names())
    for name, origin in _tied_names(model).items():
        if {name, origin} <= have and not _equal(source.weights.stored(name), source.weights.stored(origin)):
            raise InputError(
                f"{source.path}: {name} differs from {origin} but the config ties them: set tie_word_embeddings false"
            )


def _equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors hold the same, compared piece by piece."""
    buffers = [torch.empty(stored.piece_bytes, dtype=torch.uint8) for stored in (first, second)]
    return first.shape == second.shape and all(
        bool((first.read_piece(start, buffers[0]) == second.read_piece(start, buffers[1])).all())
        for start in first.starts()
    )


def _check_fits(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise InputError(f"{name} has shape {stored.shape} but the config says {shape}")
    if not stored.dtype.is_floating_point:
        raise InputError(f"{name} is {stored.dtype}, a quantized checkpoint: point to its original")
