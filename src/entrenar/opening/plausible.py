"""The sizes that a config.json gives, against the files it lies beside, before anything is built of them.

transformers builds what a config asks for in Python loops: a layer count that lies keeps it busy for hours. No model
has more layers than its files have tensors. Sizes that are only too large cost nothing (models are built on `meta`):
the tensors' shapes tell them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from entrenar.core.errors import InputError

_LAYERS = re.compile(r".*layers?|depth", re.IGNORECASE)
_COUNTS = re.compile(r".*(heads?|experts?|labels?|groups?|blocks?|stages?)", re.IGNORECASE)
_POSITIVE = (
    "vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size",
    "num_attention_heads", "n_head", "num_key_value_heads", "max_position_embeddings", "n_positions",
)  # fmt: skip
_FEW_LAYERS = 256  # more than any model has had
_FEW = 65536  # experts, heads, labels
_MAX_DEPTH = 32


def check_sizes(source: str, config: Mapping[str, Any], tensors: int) -> None:
    """InputError unless the sizes of a config could be of files with so many tensors.

    Args:
        source: what the error calls the config.
        config: the content of config.json, those of its parts (a text model's, a vision tower's) included.
    """
    for key, value in _values(config):
        if key in _POSITIVE and value is not None and (type(value) is not int or value < 1):
            raise InputError(f"{source}: {key} is {_shown(value)}, but it is a whole number of at least 1")
        if type(value) is not int:
            continue
        if _LAYERS.fullmatch(key) and value > max(tensors, _FEW_LAYERS):
            raise InputError(f"{source}: {key} is {_shown(value)}, but its files hold {tensors} tensors")
        if _COUNTS.fullmatch(key) and value > _FEW:
            raise InputError(f"{source}: {key} is {_shown(value)}, more than any model has ({_FEW} at most)")


def _shown(value: Any) -> str:
    """A value, cut: what a file says may be of any length."""
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:40]}…"


def _values(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every key and value of a config and of the configs in it."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _values(value, depth + 1)
