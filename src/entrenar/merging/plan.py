"""What is to be done, from headers alone: for every tensor of the result its inputs, method and parameters.

Layers are recognised by their names (`….layers.3.…`). What stands outside of them comes from the first slice
(embeddings) and from the last (norm and head), both at gradient position 0.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch

from entrenar.core.errors import InputError, listing
from entrenar.merging.config import MergeConfig, SliceConfig
from entrenar.merging.models import InputModel, InputTensor, open_input
from entrenar.merging.names import shown_names
from entrenar.merging.parts import HEAD, Part, check_nothing_is_lost, is_embedding, told_of_losses
from entrenar.merging.registry import Method, method_named
from entrenar.merging.settings import Level, options_for
from entrenar.merging.vocabulary import Vocabulary, align, is_vocabulary


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the result; `models` without the base, `names` what each of them calls it, `kind` its name without
    the layer's number."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    options: dict[str, Any]
    labels: list[str]
    names: list[str]
    models: list[InputTensor]
    base: InputTensor | None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """In the result."""
        return self.numel * self.dtype.itemsize

    @property
    def input_bytes(self) -> int:
        """Of all inputs, in their files."""
        return sum(tensor.bytes for tensor in [*self.models, *([self.base] if self.base else [])])


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """A whole merge.

    Attributes:
        reference: the model whose config and tokenizer the result has.
        origins: for every layer of the result the layer of the reference slice's first model that it comes from.
        remarks: sentences about what the inputs have and the result has not.
    """

    method: Method
    tensors: list[PlannedTensor]
    models: dict[str, InputModel]
    reference: InputModel
    origins: list[int]
    is_tied: bool
    vocabulary: Vocabulary | None
    remarks: list[str]

    @cached_property
    def shown(self) -> dict[str, str]:
        """Model → what it is called in what is written."""
        return shown_names(self.models)


def make_plan(config: MergeConfig) -> MergePlan:
    """Open every model and decide about every tensor.

    Raises:
        InputError: a method, parameter or filter that is not known or not read, models that do not fit each other.
    """
    method = method_named(config.merge_method, "merge_method")
    models: dict[str, InputModel] = {}
    parts = list(_parts(config, method, models))
    first, last = parts[0].reference[0], parts[-1].reference[0]
    reference = models.get(config.base_model or "", first)
    if method.statistic and config.vocabulary:
        raise InputError(f"{method.name} merges models of one vocabulary only: leave tokenizer_source out")
    vocabulary = align(config.vocabulary, models, reference)
    is_tied = all(model.is_tied or HEAD not in model.tensors for part in parts for model, *_ in part.models)
    is_tied = is_tied and (reference.is_tied or HEAD not in reference.tensors)
    check_nothing_is_lost(parts)
    tensors = [
        _planned(config, method, part, name, kind, offset, position, vocabulary)
        for part, name, kind, offset, position in _names(parts, first, last, is_tied)
    ]
    for level in {id(level): level for part in parts for level in _levels(part)}.values():
        level.check_filters()
    origins = [part.reference[1] + offset for part in parts for offset in range(part.length)]
    return MergePlan(
        method=method, tensors=tensors, models=models, reference=reference, origins=origins, is_tied=is_tied,
        vocabulary=vocabulary, remarks=told_of_losses(models, parts, {tensor.name for tensor in tensors}),
    )  # fmt: skip


def _levels(part: Part) -> list[Level]:
    return [*part.shared, *(level for *_, levels in part.models for level in levels)]


def _parts(config: MergeConfig, method: Method, models: dict[str, InputModel]) -> Iterator[Part]:
    body = config.body
    everywhere = [Level("parameters", config.parameters)]
    if config.modules is not None:
        everywhere.insert(0, Level("modules.parameters", body.parameters))
    for level in everywhere:
        level.check(method)
    for number, piece in enumerate(body.slices or [None]):
        shared = everywhere if piece is None else [Level(f"slices.{number}.parameters", piece.parameters), *everywhere]
        sources = _sources(config, piece, number)
        yield _part(config, method, models, piece, sources, shared)


Sources = list[tuple[str, tuple[int, int] | None, Level]]


def _sources(config: MergeConfig, piece: SliceConfig | None, number: int) -> Sources:
    """(label, layer range or None for all, its own parameters)."""
    if piece is None:
        return [
            (model.model, None, Level(f"models.{index}.parameters", model.parameters))
            for index, model in enumerate(config.body.models or [])
        ]
    return [
        (source.model, source.layer_range, Level(f"slices.{number}.sources.{index}.parameters", source.parameters))
        for index, source in enumerate(piece.sources)
    ]


def _part(
    config: MergeConfig, method: Method, models: dict[str, InputModel], piece: SliceConfig | None, sources: Sources,
    shared: list[Level],
) -> Part:  # fmt: skip
    base_label = None if method.base == "ignored" else (piece and piece.base_model) or config.base_model
    for label in [*(label for label, *_ in sources), *([base_label] if base_label else []), config.base_model]:
        if label is not None and label not in models:
            models[label] = open_input(label)
    for *_, level in sources:
        level.check(method)
    ranges = [(models[label], span or (0, models[label].layers), level) for label, span, level in sources]
    _check_ranges(ranges, models[base_label] if base_label else None, piece is None)
    where = "models" if piece is None else "slices"
    others = [entry for entry in ranges if entry[0].label != base_label]
    method.check_inputs(len(others), base_label is not None, where)
    inputs = [(model, span[0], [level, *shared]) for model, span, level in others]
    begin = next((span[0] for model, span, _ in ranges if model.label == base_label), ranges[0][1][0])
    base = (models[base_label], begin) if base_label else None
    length = ranges[0][1][1] - ranges[0][1][0]
    unread = [level for model, _, level in ranges if model.label == base_label and level.values]
    return Part(inputs, base, shared, length, unread)


def _check_ranges(
    ranges: Sequence[tuple[InputModel, tuple[int, int], Level]], base: InputModel | None, whole: bool
) -> None:
    if not ranges:
        raise InputError("models: the list is empty: name the models to merge")
    for model, (_, end), _ in ranges:
        if end > model.layers:
            raise InputError(f"{model.label} has {model.layers} layers: a layer_range cannot end at {end}")
    counts = {model.label: model.layers for model, *_ in ranges} | ({base.label: base.layers} if base else {})
    if whole and len(set(counts.values())) != 1:
        told = listing([f"{label}: {count}" for label, count in counts.items()])
        raise InputError(f"the models have different numbers of layers ({told}): use slices with layer ranges")


def _names(
    parts: list[Part], first: InputModel, last: InputModel, is_tied: bool
) -> Iterator[tuple[Part, str, str, int | None, float]]:
    """(part, name in the result, kind, offset of the layer in the part, gradient position)."""
    is_whole = len(parts) == 1 and parts[0].length == first.layers
    outside = [name for name in first.outside if is_embedding(name)]
    yield from ((parts[0], name, name, None, first.by_layer.positions.get(name, 0.0)) for name in outside)
    layer = 0
    for part in parts:
        model, begin = part.reference
        by_layer: dict[int, list[tuple[str, str]]] = {}
        for before, index, after in model.by_layer.places.values():
            by_layer.setdefault(index, []).append((before, after))
        for offset in range(part.length):
            position = offset / (part.length - 1) if part.length > 1 else 1.0
            for before, after in by_layer.get(begin + offset, []):
                yield part, f"{before}{layer}{after}", f"{before}*{after}", offset, position
            layer += 1
    beyond = last.by_layer.beyond if not is_whole else ()
    outside = [name for name in last.outside if not is_embedding(name) and name not in beyond and name != HEAD]
    outside += [] if is_tied else [HEAD]
    yield from ((parts[-1], name, name, None, last.by_layer.positions.get(name, 0.0)) for name in outside)


def _planned(
    config: MergeConfig, method: Method, part: Part, name: str, kind: str, offset: int | None, position: float,
    vocabulary: Vocabulary | None,
) -> PlannedTensor:  # fmt: skip
    inputs = [_input(model, begin, kind, offset, vocabulary) for model, begin, _ in part.models]
    base = None if part.base is None else _input(*part.base, kind, offset, vocabulary)
    owners = [*(model.label for model, *_ in part.models), *([part.base[0].label] if part.base else [])]
    every = [*inputs, *([base] if base else [])]
    _check_shapes(name, dict(zip(owners, every, strict=True)))
    names = [_name_in(model, begin, kind, offset) for model, begin, _ in part.models]
    options = options_for(method, name, position, part.shared, [levels for *_, levels in part.models], names)
    asked = config.out_dtype or config.dtype
    if any(tensor.is_buffer for tensor in every):
        _check_buffers(name, dict(zip(owners, every, strict=True)))
        asked = None
    dtype = getattr(torch, asked) if asked else reduce(torch.promote_types, (tensor.dtype for tensor in every))
    return PlannedTensor(
        name=name, kind=kind, shape=every[0].shape, dtype=dtype, options=options,
        labels=[model.label for model, *_ in part.models], models=inputs, base=base,
        names=names,
    )  # fmt: skip


def _name_in(model: InputModel, begin: int, kind: str, offset: int | None) -> str:
    """What a model calls a tensor of the result."""
    name = kind if offset is None else kind.replace("*", str(begin + offset), 1)
    if name == HEAD and name not in model.tensors:  # tied in this model, but not in all
        name = next((n for n in model.outside if "embed_tokens" in n), name)
    return name


def _input(model: InputModel, begin: int, kind: str, offset: int | None, vocabulary: Vocabulary | None) -> InputTensor:
    name = _name_in(model, begin, kind, offset)
    if name not in model.tensors:
        raise InputError(
            f"{model.label} has no tensor {name}, which other models of the merge have: merge models of one kind"
        )
    tensor = model.tensors[name]
    if not (tensor.is_weight or tensor.is_buffer):
        raise InputError(
            f"{model.label}: {name} is {tensor.dtype}, which is not a weight: remove it from the checkpoint"
        )
    if vocabulary is None or offset is not None or not is_vocabulary(name):
        return tensor
    return vocabulary.aligned(model.label, name, tensor)


def _check_buffers(name: str, inputs: dict[str, InputTensor]) -> None:
    if len({tensor.dtype for tensor in inputs.values()}) > 1:
        told = listing([f"{label}: {tensor.dtype}" for label, tensor in inputs.items()])
        raise InputError(f"{name} is of different types, and integers are not merged ({told}): remove it from one")


def _check_shapes(name: str, inputs: dict[str, InputTensor]) -> None:
    if len({tensor.shape for tensor in inputs.values()}) == 1:
        return
    told = listing([f"{label}: {list(tensor.shape)}" for label, tensor in inputs.items()])
    same_columns = len({tensor.shape[1:] for tensor in inputs.values()}) == 1
    cure = (
        "the vocabularies differ, set tokenizer_source: base or union"
        if same_columns and (name == HEAD or is_embedding(name))
        else "merge models of one architecture"
    )
    raise InputError(f"{name} has different shapes ({told}): {cure}")
