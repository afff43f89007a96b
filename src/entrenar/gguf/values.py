"""The keys of a GGUF that llama.cpp computes with: that they are numbers one can compute with, and that they say what
our model classes compute.

The lists are derived: every key of llama.cpp's table (llama-arch.cpp of llama-cpp-python 0.3.36) was set to other
values in a tiny file of every family, and llama.cpp was asked for logits. What changes them, or is refused there, is
an argument of a config (config.py, keys.py) or stands here; tests/interop/test_gguf_keys.py asks again.
"""

import math
from collections.abc import Mapping
from typing import Any

from entrenar.core.errors import InputError
from entrenar.gguf.families import Family

MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
_MOST = 2**31 - 1
_SIZES = (
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.scaling.original_context_length",
)  # fmt: skip
_A_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")  # one number, or one a layer
_POSITIVE = ("attention.layer_norm_rms_epsilon", "rope.scaling.attn_factor")
_BASES = ("rope.freq_base", "rope.freq_base_swa")
_NOT_NEGATIVE = (
    "rope.scaling.factor", "rope.scale_linear", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
_COUNTS = ("attention.sliding_window",)
_PATTERNS = ("attention.sliding_window_pattern",)
_SCALINGS = ("none", "linear", "yarn", "longrope")  # llama.cpp stops at any other
_MIXTURE = ("expert_count", "expert_used_count", "expert_group_count")
_NOT_ZERO = {"gemma2": ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")}
_SLIDING = ("gemma2", "gemma3")  # the architectures where some layers have keys of their own, `*_swa`


def checked_keys(keys: Mapping[str, Any], architecture: str, source: str) -> dict[str, Any]:
    """The keys, without the architecture's prefix, each with a value that can be computed with.

    A number for every layer, all the same, becomes that number.

    Raises:
        InputError: another type, a size that is none, numbers that differ from layer to layer, layers without end.
    """
    checked = dict(keys)
    _check("block_count", checked, _is_size, f"a number of layers, 1 to {MOST_LAYERS}", architecture, source)
    layers = checked.get("block_count", 0)
    if layers > MOST_LAYERS:
        raise InputError(f"{source} says {layers} layers: llama.cpp and this version read {MOST_LAYERS}")
    for key in _A_LAYER:
        if isinstance(checked.get(key), list):
            checked[key] = _one_for_all(checked, key, architecture, source)
    for names, test, wanted in (
        (_SIZES, _is_size, f"a whole number from 1 to {_MOST}"),
        (_COUNTS, _is_count, f"a whole number from 0 to {_MOST}"),
        (_PATTERNS, lambda value: _is_count(value) or isinstance(value, list), "a whole number or a list"),
        (_POSITIVE, lambda value: _is_number(value) and value > 0, "a number above 0"),
        (_BASES, lambda value: _is_number(value) and 1e-6 < value < 1e18, "a number from 1e-6 to 1e18"),
        (_NOT_NEGATIVE, lambda value: _is_number(value) and value >= 0, "a number, 0 or above"),
        (_NOT_ZERO.get(architecture, ()), lambda value: value > 0, "above 0"),
        (("rope.scaling.type",), lambda value: value in _SCALINGS, f"one of {', '.join(_SCALINGS)}"),
    ):
        for key in names:
            _check(key, checked, test, wanted, architecture, source)
    return checked


def _check(key: str, keys: Mapping[str, Any], test: Any, wanted: str, architecture: str, source: str) -> None:
    if key in keys and not test(keys[key]):
        shown = repr(keys[key]) if len(repr(keys[key])) < 60 else f"{repr(keys[key])[:60]}…"
        raise InputError(f"{source}: the key {architecture}.{key} is {shown}, but must be {wanted}: export it again")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= _MOST


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)  # llama.cpp refuses whole numbers there too


def _one_for_all(keys: Mapping[str, Any], key: str, architecture: str, source: str) -> Any:
    """What a key says of every layer."""
    values = keys[key]
    if len(values) != keys.get("block_count", len(values)) or not values:
        raise InputError(
            f"{source}: the key {architecture}.{key} has {len(values)} numbers, but there are "
            f"{keys.get('block_count')} layers: export it again"
        )
    for value in values:
        _check(key, {key: value}, _is_size, f"a whole number from 1 to {_MOST}", architecture, source)
    if any(value != values[0] for value in values):
        raise InputError(
            f"{source}: the key {architecture}.{key} differs from layer to layer ({min(values)} to {max(values)}), "
            "which this version does not read: load the model's Hugging Face directory"
        )
    return values[0]


def check_computed(keys: Mapping[str, Any], family: Family, longrope: bool, source: str) -> None:
    """InputError for a key by which llama.cpp computes something else than our class of this architecture.

    Args:
        keys: checked ones, see `checked_keys`.
        longrope: whether the file holds longrope's divisors.
    """
    architecture = family.architecture
    experts = [key for key in _MIXTURE if _differs(keys.get(key, 0), 0)]
    if experts:
        raise InputError(
            f"{source} is a mixture of experts ({architecture}.{experts[0]} = {keys[experts[0]]}), which this version "
            "does not read from GGUF: load the model's Hugging Face directory"
        )
    for key, wanted in _computed(keys, family, longrope).items():
        if _differs(keys.get(key, wanted), wanted):
            raise InputError(
                f"{source}: the key {architecture}.{key} is {keys[key]}, and this version computes {architecture} "
                f"only with {wanted}: load the model's Hugging Face directory"
            )
    _check_value_length(keys, architecture, source)
    head = keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])
    rotated = keys.get("rope.dimension_count", 2)
    if rotated % 2 or rotated > head:
        raise InputError(f"{source}: the key {architecture}.rope.dimension_count is {rotated}, not pairs within a head")


def _computed(keys: Mapping[str, Any], family: Family, longrope: bool) -> dict[str, Any]:
    """Key → the only value that our class computes with; the value too where the key is missing."""
    architecture = family.architecture
    evenly = keys["embedding_length"] // keys["attention.head_count"]
    head = keys.get("attention.key_length", evenly)
    wanted: dict[str, Any] = {"attention.causal": True, "nextn_predict_layers": 0}
    if not family.own_head_size:
        wanted["attention.key_length"] = evenly
    if architecture != "phi3":
        wanted["rope.dimension_count"] = head
    if not longrope and keys.get("rope.scaling.type") != "yarn":
        wanted["rope.scaling.attn_factor"] = 1.0
    if architecture in _SLIDING:
        wanted |= {f"attention.{side}_length_swa": head for side in ("key", "value")}
        wanted["rope.dimension_count_swa"] = head
    if architecture == "gemma2":
        wanted["rope.freq_base_swa"] = keys.get("rope.freq_base", 10000.0)
    return wanted


def _check_value_length(keys: Mapping[str, Any], architecture: str, source: str) -> None:
    evenly = keys["embedding_length"] // keys["attention.head_count"]
    head, value = (keys.get(f"attention.{side}_length", evenly) for side in ("key", "value"))
    if head != value:
        raise InputError(
            f"{source}: {architecture} with heads of {head} for keys ({architecture}.attention.key_length) and "
            f"{value} for values (….value_length) is not read: export it again"
        )


def _differs(value: Any, wanted: Any) -> bool:
    """Whether a key's value, or one of several, is another; numbers to the precision of float32."""
    if isinstance(value, list):
        return any(_differs(one, wanted) for one in value)
    if isinstance(wanted, bool) or isinstance(value, bool) or not isinstance(value, int | float):
        return value is not wanted
    return not math.isclose(value, wanted, rel_tol=1e-6)
