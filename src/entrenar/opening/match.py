"""A source's tensors against a model's: the same names, shapes and kinds, or an error that says which.

A model's tensors are its parameters and those of its buffers that it saves (transformers' `persistent`: Gemma 4's
layer_scalar, the correction bias of a router).
"""

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from entrenar.core.errors import InputError, listing
from entrenar.core.notices import say_once
from entrenar.files.stored_tensor import StoredTensor
from entrenar.models.experts import PROJECTIONS, expert_modules, expert_weights, file_name
from entrenar.opening.source import ModelSource


def match_tensors(model: PreTrainedModel, source: ModelSource) -> dict[str, StoredTensor]:
    """The source's tensor for each parameter and saved buffer, in the order of the files; a tied one may have none.

    Under transformers' names, but those of a mixture's blocks as the files have them (models/experts.py). Of a weight
    that the source holds quantized (`ModelSource.prequantized`) it is the tensor of its codes.

    Raises:
        InputError: a parameter or saved buffer without a tensor or the reverse, a shape or dtype that does not fit, or
            a tied tensor with values of its own.
    """
    _check_names(model, source)
    names, packed = set(source.weights.names()), source.prequantized.formats() if source.prequantized else {}
    found: dict[str, StoredTensor] = {}
    buffers = saved_buffers(model)
    for name, shape in _wanted(model, names).items():
        if name in names:
            found[name] = source.weights.stored(name)
            if name not in packed:
                _check_fits(f"{source.path}: {name}", found[name], shape, is_buffer=name in buffers)
            elif packed[name][1] != shape:
                raise InputError(f"{source.path}: {name} has shape {packed[name][1]} but the config says {shape}")
    _check_tied(model, source)
    return dict(sorted(found.items(), key=lambda item: (str(item[1].file.path), item[1].start)))


def saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name → every buffer that the model's files hold."""
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in model.state_dict() if name in buffers}


def _wanted(model: PreTrainedModel, have: set[str]) -> dict[str, tuple[int, ...]]:
    """Name of every tensor that files which have the tensors `have` should have → its shape."""
    experts = expert_weights(model, have)
    fused = {f"{path}.{name}" for path in expert_modules(model) for name in PROJECTIONS}
    tensors = {**dict(model.named_parameters()), **saved_buffers(model)}
    plain = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in fused}
    return {file_name(name, have): shape for name, shape in plain.items()} | {n: e.shape for n, e in experts.items()}


def _check_names(model: PreTrainedModel, source: ModelSource) -> None:
    """InputError unless the source has exactly the model's tensors (a tied head may be there or not)."""
    have = set(source.weights.names())
    wanted = _wanted(model, have).keys()
    optional = set(_tied_names(model)) | {name for name in have if name.endswith("rotary_emb.inv_freq")}
    if source.gguf:  # what a GGUF has as keys, or not at all, is computed
        optional |= saved_buffers(model).keys()
    missing, unexpected = sorted(wanted - have - optional), sorted(have - wanted - optional)
    unexpected = _not_ignored(model, source, unexpected)
    kind = type(model).__name__
    if missing and unexpected:
        raise InputError(_other_names(model, source, missing, unexpected))
    if missing:
        raise InputError(f"{source.path} lacks {len(missing)} tensors of {kind}: {listing(missing, 5)}")
    if unexpected:
        raise InputError(f"{source.path} has {len(unexpected)} tensors that {kind} lacks: {listing(unexpected, 5)}")


def _not_ignored(model: PreTrainedModel, source: ModelSource, names: list[str]) -> list[str]:
    """Those of the names that the model's own class does not say to leave out: layers that only predict further tokens,
    masks that old files hold. What is left out is said."""
    buffers = {name for name, _ in model.named_buffers()}
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ())]
    if any(name.endswith("position_ids") for name in buffers):  # as transformers adds to them itself
        patterns.append(r"(^|\.)position_ids$")
    ignored = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
    weights = [name for name in ignored if name.rpartition(".")[2] == "weight"]
    if weights:
        say_once(
            f"{source.path}: {len(weights)} weights are not used by {type(model).__name__} and left out, as by "
            f"transformers: {listing(weights, 3)}"
        )
    return [name for name in names if name not in ignored]


def _other_names(model: PreTrainedModel, source: ModelSource, missing: list[str], unexpected: list[str]) -> str:
    """What to say where the files have other names than the model."""
    kind = type(model).__name__
    renamed = _renamed_by_transformers(model, unexpected)
    found = next((name for name in unexpected if renamed.get(name) in missing), None)
    if found is not None and type(model.config.get_text_config()) is not type(model.config):
        return (
            f"{source.path} is a {kind}, a model of several kinds of input, whose files name their tensors otherwise; "
            "such models are not read: take a checkpoint of its language model alone"
        )
    if found is not None:
        return (
            f"{source.path} names its tensors otherwise than {kind}: {found} is {renamed[found]} there. transformers "
            "renames them as it loads them, which is not done here: load it there and save it with "
            "save_pretrained(…, save_original_format=False)"
        )
    longer = next(((name, end) for end in missing for name in unexpected if name.endswith(f".{end}")), None)
    if longer is not None:
        before = longer[0].removesuffix(longer[1])
        return (
            f"{source.path} names its tensors with {before!r} before the names of {kind}'s ({longer[0]}), as a wrapper "
            "around the model leaves it: take that away and save it again"
        )
    return (
        f"{source.path} lacks {len(missing)} tensors of {kind}: {listing(missing, 5)}; and has {len(unexpected)} that "
        f"{kind} lacks: {listing(unexpected, 5)}"
    )


def _renamed_by_transformers(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Name in files → what transformers' own loading makes of it."""
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    state = model.state_dict()
    return {name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0] for name in names}


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


def _check_fits(name: str, stored: StoredTensor, shape: tuple[int, ...], *, is_buffer: bool) -> None:
    if stored.shape != shape:
        raise InputError(f"{name} has shape {stored.shape} but the config says {shape}")
    if not stored.dtype.is_floating_point and not is_buffer:
        raise InputError(f"{name} is {stored.dtype}, a quantized checkpoint: point to its original")
