"""What an adapter is to be, before there is a model: its options, checked, and how its factors start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from entrenar.core.errors import InputError
from entrenar.files.lora_options import BIASES, LoraOptions
from entrenar.files.peft import PeftAdapter
from entrenar.files.peft_tensors import A_END, B_END, EMBEDDING_ENDS
from entrenar.lora.matching import ALL_LINEAR, allowed, in_layers, named_by


@dataclass(frozen=True, kw_only=True)
class LoraSpec(LoraOptions):
    """The options of an adapter that is to be attached, with their defaults.

    Attributes:
        init: a name of lora/initial.py's registry.

    Raises:
        InputError: a choice that does not exist, or a negative alpha.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | Sequence[str] = ALL_LINEAR
    keeps_ties: bool = True
    init: str = "default"

    def __post_init__(self) -> None:
        """InputError for a choice that does not exist."""
        if self.bias not in BIASES:
            raise InputError(f"bias is {self.bias!r}: choose {', '.join(BIASES)}")
        if self.alpha < 0:
            raise InputError(f"alpha {self.alpha} is negative: choose 0 or more")


def spec_of(adapter: PeftAdapter) -> LoraSpec:
    """The spec of an adapter on disk; how it started is in the past.

    Raises:
        InputError: factors of another rank than the config says, whose scale would then be another too.
    """
    spec = LoraSpec(**{option.name: getattr(adapter, option.name) for option in fields(LoraOptions)})
    _check_ranks(adapter, spec)
    return spec


def _check_ranks(adapter: PeftAdapter, spec: LoraSpec) -> None:
    for name, parts in adapter.tensors.layers.items():
        a, b = (parts[end] for end in (EMBEDDING_ENDS if EMBEDDING_ENDS[0] in parts else (A_END, B_END)))
        rank = spec.for_layer(name).rank
        is_experts = adapter.target_parameters and name.split(".")[-2:-1] == ["experts"]  # one pair for each of them
        if a.shape[0] != b.shape[1] or (a.shape[0] % rank if is_experts else a.shape[0] != rank):
            raise InputError(
                f"the adapter has A and B of shapes {tuple(a.shape)} and {tuple(b.shape)} at {name}, and its config "
                f"gives that layer the rank {rank}: they do not belong together"
            )


def of_scale_one(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The options `rank`, `alpha` and their patterns by which every layer has its rank, and a scale of 1."""
    rank = max(ranks.values())
    others = {name: number for name, number in ranks.items() if number != rank}
    alphas = {name: float(number) for name, number in others.items()}
    return {"rank": rank, "alpha": float(rank), "rank_pattern": others, "alpha_pattern": alphas}


def config_layers(names: Sequence[str], spec: LoraOptions) -> list[str]:
    """Of the paths of layers those that a config with a list or an expression names."""
    chosen = allowed(named_by(names, spec.targets), spec.exclude, spec.modules_to_save)
    return chosen if isinstance(spec.targets, str) else in_layers(chosen, spec.layers, spec.layers_pattern)
