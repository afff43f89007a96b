"""The options of a LoRA adapter, the same from the YAML of a run to the PEFT file.

A run's config (recipes/config.py) and `attach_lora` make a `LoraSpec` of them (lora/spec.py); what is read from a PEFT
directory or written to one is a `PeftAdapter` (files/peft.py); files/peft_config.py has PEFT's names for them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from entrenar.core.errors import InputError

_Number = TypeVar("_Number", int, float)
Bias = Literal["none", "all", "lora_only"]
BIASES: tuple[str, ...] = get_args(Bias)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The numbers of one layer's adapter."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank; of rsLoRA alpha / √rank (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """The numbers of a model's adapter, and which layers it is for.

    Attributes:
        targets: which layers; see `attach_lora`.
        rslora: scale = alpha / √rank instead of alpha / rank (rsLoRA, Kalajdzievski 2023).
        dora: rows of the adapted weight get a trained length (lora/dora.py).
        bias: train no bias, those of the adapted layers (`lora_only`), or every one (`all`).
        rank_pattern, alpha_pattern: name → number; the name is a regular expression for a layer's whole name or for its
            end after a dot, the first that matches counts (as in peft).
        modules_to_save: ends of the paths of modules that are trained whole beside the adapter (embeddings, lm_head, a
            norm).
        exclude, layers, layers_pattern: what narrows the targets, see lora/matching.py.
        keeps_ties: weights that were tied and are trained whole stay one (peft's `ensure_weight_tying`).
        token_indices: end of a module's name → tokens whose rows in it are trained (lora/token_rows.py); "": the
            model's embedding.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str | Sequence[str]
    rslora: bool = False
    dora: bool = False
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: Sequence[str] = field(default_factory=list)
    exclude: str | Sequence[str] = field(default_factory=list)
    layers: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    keeps_ties: bool = False
    token_indices: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def for_layer(self, name: str) -> LayerSpec:
        """The numbers of the layer `name`."""
        return LayerSpec(
            rank=_by_pattern(self.rank_pattern, name, self.rank),
            alpha=_by_pattern(self.alpha_pattern, name, self.alpha),
            dropout=self.dropout,
            rslora=self.rslora,
        )

    def unused_patterns(self, names: Sequence[str]) -> list[str]:
        """Patterns that match none of the adapted layers."""
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        return [pattern for pattern in patterns if not any(_matches(pattern, name) for name in names)]


def _by_pattern(patterns: Mapping[str, _Number], name: str, default: _Number) -> _Number:
    return next((number for pattern, number in patterns.items() if _matches(pattern, name)), default)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error as error:
        raise InputError(f"the rank or alpha pattern {pattern!r} is not a regular expression: {error}") from None
