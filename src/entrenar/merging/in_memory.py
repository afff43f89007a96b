"""The merge methods on tensors in memory: `entrenar.merge.ties({"a": model_a, "b": model_b}, base, density=0.5)`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from entrenar.core.errors import InputError, listing
from entrenar.merging.registry import Method, method_named
from entrenar.merging.stack import MemoryReader, Scratch, Stack

StateDict = Mapping[str, Tensor]
Models = Mapping[str, Tensor] | Mapping[str, StateDict] | Sequence[Tensor] | Sequence[StateDict]


def merge_tensors(
    method: str,
    models: Models,
    base: Tensor | StateDict | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    statistics: Models | None = None,
    **parameters: Any,
) -> Tensor | dict[str, Tensor]:
    """Merge tensors of one shape, or models as dicts of tensors.

    Args:
        models: the models without the base, as a sequence or by name; each a tensor or a dict of tensors. One dict of
            tensors beside a base that is a dict is one model.
        base: of the same kind; where a method needs one.
        seed: of the random masks, which depend on the names of model and tensor besides.
        dtype: of the result; by default the common type of the inputs.
        statistics: for fisher and regmean, in the order or by the names of the models: the mean squared gradient in
            each tensor's shape, or XᵀX (columns, columns) of a linear layer's inputs.
        parameters: the method's. What every model has of its own is a number for all, a sequence in the order of the
            models, or a dict by name; the weight is 1 by default. `lambda` may be written `lambda_`.

    Raises:
        InputError: an unknown parameter, a value out of range, or inputs that do not fit each other.
    """
    row = method_named(method, "merge")
    named = _by_name(models, base)
    row.check_inputs(len(named), base is not None, "merge")
    options = _options(row, list(named), parameters)
    measured = _statistics(row, list(named), statistics, parameters)
    tables = [_as_dict(value) for value in named.values()]
    base_table = None if base is None else _as_dict(base)
    names = _common_names([*tables, *([base_table] if base_table is not None else [])])
    scratch = Scratch()
    merged = {}
    for name in names:
        base_tensor = None if base_table is None or row.base == "ignored" else base_table[name]
        inputs = {label: table[name] for label, table in zip(named, tables, strict=True)}
        known = [_source(table[name]) if name in table else None for table in measured]
        merged[name] = _merge_one(row, name, inputs, base_tensor, options, seed, dtype, scratch, known)
    return merged[""] if list(merged) == [""] else merged


def _by_name(models: Models, base: Tensor | StateDict | None) -> dict[str, Tensor | StateDict]:
    if isinstance(models, Mapping):
        if isinstance(base, Mapping) and all(isinstance(value, Tensor) for value in models.values()):
            return {"0": cast(StateDict, models)}
        return dict(models)
    return {str(index): model for index, model in enumerate(models)}


def _statistics(
    row: Method, labels: list[str], statistics: Models | None, parameters: Mapping[str, Any]
) -> list[StateDict]:
    """One table a model; empty for a method that asks for none."""
    if row.statistic is None or statistics is None or "text" in parameters:
        if row.statistic is not None:
            raise InputError(f"merge: {row.name} of tensors needs their {row.statistic}: give them as statistics=…")
        if statistics is not None:
            raise InputError(f"merge: {row.name} does not read statistics: leave them out")
        return []
    named = dict(statistics) if isinstance(statistics, Mapping) else {str(i): one for i, one in enumerate(statistics)}
    if set(named) != set(labels):
        raise InputError(f"merge: statistics are given for {listing(list(named))}, the models are {listing(labels)}")
    return [_as_dict(named[label]) for label in labels]


def _as_dict(value: Tensor | StateDict) -> StateDict:
    return {"": value} if isinstance(value, Tensor) else value


def _common_names(tables: list[StateDict]) -> list[str]:
    odd = sorted({name for table in tables for name in table} - set.intersection(*(set(table) for table in tables)))
    if odd:
        raise InputError(f"merge: not every model has {listing(odd, 3)}: give models of one architecture")
    return list(tables[0])


def _options(row: Method, labels: list[str], given: Mapping[str, Any]) -> dict[str, Any]:
    given = {name.rstrip("_"): value for name, value in given.items()}
    for name in given:
        row.parameter(name, "merge")
    options: dict[str, Any] = {}
    for name, parameter in row.parameters.items():
        default = 1.0 if name == "weight" else parameter.default
        if name not in given and name != "weight" and parameter.is_required:
            raise InputError(f"merge: {row.name} needs the parameter {name!r}")
        value = given.get(name, default)
        if not parameter.is_per_model:
            options[name] = parameter.check(name, value, "merge")
            continue
        options[name] = tuple(parameter.check(name, one, "merge") for one in _spread(name, value, labels))
    return options


def _spread(name: str, value: Any, labels: list[str]) -> list[Any]:
    """One value a model."""
    if isinstance(value, Mapping):
        if set(value) != set(labels):
            raise InputError(f"merge: {name} is given for {listing(list(value))}, the models are {listing(labels)}")
        return [value[label] for label in labels]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(labels):
            raise InputError(f"merge: {name} has {len(value)} values for {len(labels)} models")
        return list(value)
    return [value] * len(labels)


def _merge_one(
    row: Method, name: str, inputs: dict[str, Tensor], base: Tensor | None, options: dict[str, Any],
    seed: int, dtype: torch.dtype | None, scratch: Scratch, statistics: Sequence[MemoryReader | None],
) -> Tensor:  # fmt: skip
    every = [*inputs.values(), *([] if base is None else [base])]
    shapes = {tuple(tensor.shape) for tensor in every}
    if len(shapes) != 1:
        raise InputError(f"merge: {name or 'the tensors'} has different shapes: {listing([str(s) for s in shapes])}")
    wide = torch.float32 if any(not tensor.is_floating_point() for tensor in every) else every[0].dtype
    for tensor in every:
        wide = torch.promote_types(wide, tensor.dtype)
    stack = Stack(
        name=name, shape=tuple(every[0].shape), models=[_source(tensor) for tensor in inputs.values()],
        base=None if base is None else _source(base), labels=list(inputs), scratch=scratch, seed=seed,
        whole_rows=row.whole_rows, statistics=statistics,
    )  # fmt: skip
    out = torch.empty(stack.shape, dtype=dtype or wide)
    for start, piece in run(row, stack, options, out.dtype):
        out.view(-1)[start : start + piece.numel()] = piece
    return out


def _source(tensor: Tensor) -> MemoryReader:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return MemoryReader(flat if flat.is_floating_point() and flat.dtype.itemsize > 1 else flat.float())


def run(row: Method, stack: Stack, options: Mapping[str, Any], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The merged pieces (start, (n,) `dtype` in scratch that the next piece overwrites)."""
    combine = row.function(stack, options)
    for piece in stack.pieces():
        out = stack.scratch.take("out", piece.count, dtype)
        combine(piece, out)
        yield piece.start, out
