"""What an adapter is, before there is a model: the fields of peft's config that this package understands."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from entrenar.core.errors import InputError
from entrenar.files.peft import PeftAdapter
from entrenar.files.peft_tensors import A_END, B_END, EMBEDDING_ENDS
from entrenar.lora.matching import allowed, in_layers, named_by

_Number = TypeVar("_Number", int, float)
BIASES = ("none", "all", "lora_only")


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
class LoraSpec:
    """The numbers of a model's adapter.

    Attributes:
        targets: which layers; see `attach_lora`.
        rslora: scale = alpha / √rank instead of alpha / rank (rsLoRA, Kalajdzievski 2023).
        dora: rows of the adapted weight get a trained length (lora/dora.py).
        init: a name of lora/initial.py's registry.
        rank_pattern, alpha_pattern: name → number; the name is a regular expression for a layer's whole name or for its
            end after a dot, the first that matches counts (as in peft).
        bias: train no bias, those of the adapted layers (`lora_only`), or every one (`all`).
        modules_to_save: ends of the paths of modules that are trained whole beside the adapter (embeddings, lm_head, a
            norm).
        exclude, layers, layers_pattern: what narrows the targets, see lora/matching.py.
        keeps_ties: weights that were tied and are trained whole stay one (peft's `ensure_weight_tying`).
        token_indices: end of a module's name → tokens whose rows in it are trained (lora/token_rows.py).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    layers: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    keeps_ties: bool = True
    token_indices: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """InputError for a choice that does not exist."""
        if self.bias not in BIASES:
            raise InputError(f"bias is {self.bias!r}: choose {', '.join(BIASES)}")
        if self.alpha < 0:
            raise InputError(f"alpha {self.alpha} is negative: choose 0 or more")

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


def spec_of(adapter: PeftAdapter) -> LoraSpec:
    """The spec of an adapter on disk; how it started is in the past.

    Raises:
        InputError: factors of another rank than the config says, whose scale would then be another too.
    """
    spec = LoraSpec(
        rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, targets=adapter.targets, rslora=adapter.rslora,
        dora=adapter.dora, bias=adapter.bias, rank_pattern=adapter.rank_pattern, alpha_pattern=adapter.alpha_pattern,
        modules_to_save=adapter.modules_to_save, token_indices=adapter.token_indices, exclude=adapter.exclude,
        layers=adapter.layers, layers_pattern=adapter.layers_pattern, keeps_ties=adapter.keeps_ties,
    )  # fmt: skip
    _check_ranks(adapter, spec)
    return spec


def _check_ranks(adapter: PeftAdapter, spec: LoraSpec) -> None:
    for name, parts in adapter.tensors.layers.items():
        kind = EMBEDDING_ENDS[0] in parts
        a, b = (parts[end] for end in (EMBEDDING_ENDS if kind else (A_END, B_END)))
        rank = spec.for_layer(name).rank
        is_experts = adapter.target_parameters and name.split(".")[-2:-1] == ["experts"]  # one pair for each of them
        if a.shape[0] != b.shape[1] or (a.shape[0] % rank if is_experts else a.shape[0] != rank):
            raise InputError(
                f"the adapter has A and B of shapes {tuple(a.shape)} and {tuple(b.shape)} at {name}, and its config "
                f"gives that layer the rank {rank}: they do not belong together"
            )


def config_layers(names: Sequence[str], spec: LoraSpec) -> list[str]:
    """Of the paths of layers those that a config with a list or an expression names."""
    chosen = allowed(named_by(names, spec.targets), spec.exclude, spec.modules_to_save)
    return chosen if isinstance(spec.targets, str) else in_layers(chosen, spec.layers, spec.layers_pattern)


def _by_pattern(patterns: Mapping[str, _Number], name: str, default: _Number) -> _Number:
    return next((number for pattern, number in patterns.items() if _matches(pattern, name)), default)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error as error:
        raise InputError(f"the rank or alpha pattern {pattern!r} is not a regular expression: {error}") from None
