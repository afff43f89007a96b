"""What a config says layer by layer, when the layers of a result are not those of the model it comes from.

It is said in three ways: a list (or a text) with an entry for every layer, a list of layers' numbers, a rule by number
(every fourth; all from the third on). The first two follow the layers; a rule holds where it says the same of every
layer under its new number, and is told of otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entrenar.core.errors import InputError
from entrenar.merging.layers import COUNT_KEYS, TEXT_KEYS

# Lists that are as long as there are layers by chance only.
_NOT_BY_LAYER = ("architectures", "token_id", "token_ids", "mrope_section", "factor", "languages", "auto_map")
_NUMBERS_OF_LAYERS = ("layers", "_idx", "_idxs", "_indices", "_indexes", "layer_ids")

Rule = Callable[[int, int], bool]  # (layer, value) → what it says
_PERIODS = (
    "attn_layer_period", "expert_layer_period", "full_attention_interval", "no_rope_layer_interval",
    "interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_freq", "sliding_window_pattern",
    "_sliding_window_pattern", "global_attn_every_n_layers", "moe_layer_interval",
)  # fmt: skip
_THRESHOLDS = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_kv_shared_layers")
# Where these lists are there, the rule that they were once made of is not asked.
_SAID_BY = {
    "layer_types": ("full_attention_interval", "sliding_window_pattern", "_sliding_window_pattern",
                    "max_window_layers", "global_attn_every_n_layers"),
    "no_rope_layers": ("no_rope_layer_interval",),
    "layers_block_type": ("attn_layer_period",),
    "moe_layers": ("interleave_moe_layer_step",),
    "mlp_layer_types": ("first_k_dense_replace", "decoder_sparse_step"),
}  # fmt: skip


def follow_layers(config: dict[str, Any], origins: Sequence[int]) -> None:
    """Make a config (with all that is in it, changed in place) that of a model of these layers.

    Args:
        origins: for every layer of the result the one that it was.

    Raises:
        InputError: a rule by number says something else of a layer under its new number.
    """
    inside = next((config[key] for key in TEXT_KEYS if isinstance(config.get(key), dict)), config)
    count = next((inside[key] for key in COUNT_KEYS if isinstance(inside.get(key), int)), len(origins))
    same = list(origins) == list(range(count))
    for part in (config, inside) if inside is not config else (config,):
        for key in COUNT_KEYS:
            if part.get(key) == count:
                part[key] = len(origins)
        if not same:
            _check_rules(part, origins)
            part |= {key: _followed(key, value, count, origins) for key, value in part.items()}


def _followed(key: str, value: Any, count: int, origins: Sequence[int]) -> Any:
    if any(word in key for word in _NOT_BY_LAYER) or not isinstance(value, list | str):
        return value
    if isinstance(value, str):
        is_by_layer = len(value) == count and key.endswith("pattern")
        return "".join(value[origin] for origin in origins) if is_by_layer else value
    if len(value) == count:
        return [value[origin] for origin in origins]
    is_numbers = all(isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < count for entry in value)
    if value and is_numbers and key.endswith(_NUMBERS_OF_LAYERS):
        return [layer for layer, origin in enumerate(origins) if origin in value]
    return value


def _check_rules(part: Mapping[str, Any], origins: Sequence[int]) -> None:
    spoken_for = {key for said, keys in _SAID_BY.items() if isinstance(part.get(said), list) for key in keys}
    if not part.get("use_sliding_window", True):
        spoken_for.add("max_window_layers")
    for keys, rule in ((_PERIODS, _remainder), (_THRESHOLDS, _reaches)):
        for key in keys:
            value = part.get(key)
            if key in spoken_for or not isinstance(value, int) or isinstance(value, bool) or value < 1:
                continue
            changed = next((new for new, old in enumerate(origins) if rule(new, value) != rule(old, value)), None)
            if changed is not None:
                raise InputError(
                    f"the config's '{key}' ({value}) decides by the number of a layer, and layer {changed} of the "
                    f"result was layer {origins[changed]}: choose layer ranges that leave each layer what it is"
                )


def _remainder(layer: int, value: int) -> int:
    return layer % value


def _reaches(layer: int, value: int) -> bool:
    return layer >= value
