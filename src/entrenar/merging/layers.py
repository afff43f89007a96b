"""Which tensors of a model belong to which layer, from their names and the config's count.

A model may have more than one stack of layers: beside the language model's own a vision or audio tower, whose layers
have nothing to do with a merge's layer ranges, and layers beyond the count (for predicting several tokens ahead).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from entrenar.core.errors import InputError

_LAYER = re.compile(r"(?P<before>(^|.*\.)(layers|h|blocks|block)\.)(?P<index>\d{1,9})(?P<after>\..*)")
_TOWER = re.compile(r"vision|visual|vit\b|image|audio|speech|whisper|siglip|clip", re.IGNORECASE)
COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TEXT_KEYS = ("text_config", "llm_config", "language_config")

Place = tuple[str, int, str]
"""What stands before the layer's number, the number, what stands after."""


def split_layer(name: str) -> Place | None:
    """`model.layers.3.mlp.up_proj.weight` → `model.layers.`, 3, `.mlp.up_proj.weight`."""
    match = _LAYER.fullmatch(name)
    return None if match is None else (match["before"], int(match["index"]), match["after"])


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config; often all of it."""
    return next((config[key] for key in TEXT_KEYS if isinstance(config.get(key), dict)), config)


@dataclass(frozen=True)
class Layers:
    """The layers of a model.

    Attributes:
        count: of the language model's. places: tensor → its place, for the language model's layers only.
        positions: tensor of a tower's layer → its relative depth there, from 0 to 1. beyond: tensors of layers beyond
            the count.
    """

    count: int
    places: dict[str, Place]
    positions: dict[str, float]
    beyond: frozenset[str]


def layers_of(label: str, names: Iterable[str], config: dict[str, Any]) -> Layers:
    """Raises InputError where names and config contradict each other: layers are missing or too many to be real."""
    split = {name: place for name in names if (place := split_layer(name))}
    towers = {before for before, *_ in split.values() if _TOWER.search(before)}
    if towers == {before for before, *_ in split.values()}:
        towers = set()
    text = {name: place for name, place in split.items() if place[0] not in towers}
    stated = _stated(label, config)
    indices = {index for _, index, _ in text.values()}
    highest = max(indices, default=-1) + 1
    if highest > len(indices) or (stated or 0) > highest:
        missing = next(index for index in range(len(indices) + 1) if index not in indices)
        raise InputError(
            f"{label} has tensors of {len(indices)} layers, none of layer {missing}, and "
            f"{f'its config.json says {stated}' if stated else f'one numbered {highest - 1}'}: fetch it again"
        )
    count = highest if stated is None else stated
    beyond = frozenset(name for name, (_, index, _) in text.items() if index >= count)
    places = {name: place for name, place in text.items() if name not in beyond}
    return Layers(count, places, _positions(split, towers), beyond)


def _stated(label: str, config: dict[str, Any]) -> int | None:
    inside = text_config(config)
    key = next((key for key in COUNT_KEYS if inside.get(key) is not None), None)
    if key is None:
        return None
    count = inside[key]
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise InputError(f"the config.json of {label}: '{key}' is {str(count)[:60]!r} but must be a whole number")
    return count


def _positions(split: Mapping[str, Place], towers: Iterable[str]) -> dict[str, float]:
    by_tower: dict[str, dict[str, int]] = defaultdict(dict)
    for name, (before, index, _) in split.items():
        if before in towers:
            by_tower[before][name] = index
    positions: dict[str, float] = {}
    for indices in by_tower.values():
        last = max(indices.values())
        positions |= {name: index / last if last else 1.0 for name, index in indices.items()}
    return positions
