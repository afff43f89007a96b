"""Extract: the difference of two full models as an adapter of a rank, by SVD, with what it misses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from entrenar.core.atomic import refuse_existing
from entrenar.core.errors import InputError, listing
from entrenar.files.peft import write_adapter
from entrenar.files.stored_tensor import StoredTensor
from entrenar.lora.attach import match_targets
from entrenar.lora.combine import adapter_of_pairs
from entrenar.lora.initial import principal
from entrenar.lora.matching import ALL_LINEAR
from entrenar.opening.build import build_on_meta
from entrenar.opening.match import match_tensors
from entrenar.opening.source import ModelSource, open_source

_ITERATIONS = 8


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extracted adapter holds of the difference Δ between two models.

    Attributes:
        error: ‖Δ − B·A‖ / ‖Δ‖ over the adapted layers. errors: the same for each of them.
        left_out: tensors that differ but are no adapted layer, so that the adapter does not have them.
    """

    adapter: str
    error: float
    errors: dict[str, float]
    left_out: list[str]


def extract_adapter(
    base: str, tuned: str, output: str | Path, *, rank: int = 16, targets: str | Sequence[str] = ALL_LINEAR
) -> Extraction:
    """Write the adapter that makes `tuned` of `base` as well as its rank allows; one weight at a time is in memory.

    Raises:
        InputError: models of different shapes or without a difference, targets that are no linear layers, a rank that
            fits none of them, a taken output.
    """
    refuse_existing(Path(output))
    first, second = open_source(base, with_tokenizer=False), open_source(tuned, with_tokenizer=False)
    model = build_on_meta(first, torch.float32)
    ours, theirs = _read(model, first), _read(build_on_meta(second, torch.float32), second)
    if {name: shape for name, (shape, _) in ours.items()} != {name: shape for name, (shape, _) in theirs.items()}:
        raise InputError(f"{base} and {tuned} have different tensors: they are not one architecture of one size")
    adapted = {f"{name}.weight": name for name in _linear_targets(model, targets)}
    layers, errors, left_out, lost, total = {}, {}, [], 0.0, 0.0
    for name, (_, read) in ours.items():
        delta = theirs[name][1]() - read()
        size = delta.square().sum().item()
        if not size:
            continue
        if name not in adapted:
            left_out.append(name)
            continue
        layer = adapted[name]
        delta = delta.t() if isinstance(model.get_submodule(layer), Conv1D) else delta
        a, b = principal(delta, min(rank, *delta.shape), _ITERATIONS)
        missed = (delta - b @ a).square().sum().item()
        layers[layer], errors[layer] = (a, b), (missed / size) ** 0.5
        lost, total = lost + missed, total + size
    if not layers:
        raise InputError(
            f"{tuned} does not differ from {base} in any layer of the targets: there is nothing to extract"
        )
    if rank > max(len(a) for a, _ in layers.values()):  # a gate of one row takes less than the others
        largest = max(min(a.shape[1], b.shape[0]) for a, b in layers.values())
        raise InputError(f"rank {rank} does not fit any layer that differs: choose 1 to {largest}")
    transposed = any(isinstance(model.get_submodule(layer), Conv1D) for layer in layers)
    write_adapter(Path(output), replace(adapter_of_pairs(layers), fan_in_fan_out=transposed))
    return Extraction(adapter=str(output), error=(lost / total) ** 0.5, errors=errors, left_out=left_out)


def _read(model: PreTrainedModel, source: ModelSource) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """Tensor → its shape, and how it is read as float32; one that is quantized is dequantized."""
    packed = source.prequantized.formats() if source.prequantized else {}

    def dequantized(name: str) -> Tensor:
        assert source.prequantized is not None
        return source.prequantized.weight(name).read().dequantize()

    return {
        name: (packed[name][1], partial(dequantized, name))
        if name in packed
        else (stored.shape, partial(_float, stored))
        for name, stored in match_tensors(model, source).items()
    }


def _float(stored: StoredTensor) -> Tensor:
    return stored.read().float()


def _linear_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    names = match_targets(model, targets)
    others = [name for name in names if not isinstance(model.get_submodule(name), nn.Linear | Conv1D)]
    if others:
        raise InputError(
            f"{listing(others, 3)} cannot be extracted: only linear layers are; leave it out of the targets"
        )
    return names
