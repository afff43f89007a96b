"""Extract: the difference of two full models as an adapter of a rank, by SVD, with what it misses."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from entrenar.core.atomic import refuse_existing
from entrenar.core.errors import InputError
from entrenar.files.peft import write_adapter
from entrenar.lora.attach import ALL_LINEAR, match_targets
from entrenar.lora.combine import adapter_of_pairs
from entrenar.lora.initial import principal
from entrenar.models.load import build_on_meta
from entrenar.models.match import match_tensors
from entrenar.models.source import open_source

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
        InputError: models of different shapes or without a difference, a rank that does not fit, a taken output.
    """
    refuse_existing(Path(output))
    first, second = open_source(base, with_tokenizer=False), open_source(tuned, with_tokenizer=False)
    model = build_on_meta(first, torch.float32)
    ours, theirs = match_tensors(model, first), match_tensors(build_on_meta(second, torch.float32), second)
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        raise InputError(f"{base} and {tuned} have different tensors: they are not one architecture of one size")
    adapted = {f"{name}.weight": name for name in match_targets(model, targets)}
    layers, errors, left_out, lost, total = {}, {}, [], 0.0, 0.0
    for name, stored in ours.items():
        delta = theirs[name].read().float() - stored.read().float()
        size = delta.square().sum().item()
        if not size:
            continue
        if name not in adapted:
            left_out.append(name)
            continue
        if rank > min(delta.shape):
            raise InputError(
                f"rank {rank} does not fit {adapted[name]} of shape {tuple(delta.shape)}: choose a smaller one"
            )
        a, b = principal(delta, rank, _ITERATIONS)
        missed = (delta - b @ a).square().sum().item()
        layers[adapted[name]], errors[adapted[name]] = (a, b), (missed / size) ** 0.5
        lost, total = lost + missed, total + size
    if not layers:
        raise InputError(
            f"{tuned} does not differ from {base} in any layer of the targets: there is nothing to extract"
        )
    write_adapter(Path(output), adapter_of_pairs(layers))
    return Extraction(adapter=str(output), error=(lost / total) ** 0.5, errors=errors, left_out=left_out)
