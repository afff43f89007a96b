"""What a family of families.py has in its GGUF keys beside what all have, both ways.

One function writes the keys, without the architecture's prefix, from a config; one reads the arguments of a config.
Where llama.cpp knows something by heart (a pattern of layers, a scale), reading says the same, so that a config that
differs does not come back, and is refused.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from entrenar.gguf.rope import attention_factor, scaling_arguments

Keys = Mapping[str, Any]  # without the architecture's prefix
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # where llama.cpp scales scores by the width a head, not by its size


def no_more(config: PretrainedConfig) -> dict[str, Any]:
    """Nothing beside what all families have."""
    del config
    return {}


def no_arguments(keys: Keys) -> dict[str, Any]:
    """Nothing beside what all families have."""
    del keys
    return {}


def phi3_keys(config: PretrainedConfig) -> dict[str, Any]:
    """The window (llama.cpp reads it and attends to everything), the original context, longrope's factor."""
    text: Any = config
    keys = {
        "attention.sliding_window": text.sliding_window or 0,
        "rope.scaling.original_context_length": text.original_max_position_embeddings,
    }
    longrope = text.rope_parameters["rope_type"] == "longrope"
    return keys | ({"rope.scaling.attn_factor": attention_factor(config)} if longrope else {})


def phi3_arguments(keys: Keys) -> dict[str, Any]:
    """See `phi3_keys`; the part of a head that is rotated."""
    head = keys["embedding_length"] // keys["attention.head_count"]
    return {
        "sliding_window": keys.get("attention.sliding_window") or None,
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length", keys["context_length"]),
        "rope_parameters": {
            "rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0),
            "partial_rotary_factor": keys.get("rope.dimension_count", head) / head,
        },
    }  # fmt: skip


def smollm3_arguments(keys: Keys) -> dict[str, Any]:
    """Every fourth layer does not rotate, which llama.cpp knows by heart."""
    return {"no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(keys["block_count"])]}


def gemma2_keys(config: PretrainedConfig) -> dict[str, Any]:
    """The window and both caps of logits."""
    text: Any = config
    return {"attention.sliding_window": text.sliding_window} | _caps(config)


def gemma2_arguments(keys: Keys) -> dict[str, Any]:
    """See `gemma2_keys`; every other layer slides. Without a window llama.cpp takes the published one."""
    return _gemma(keys, "gemma2", period=2) | {
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
    }


def gemma3_keys(config: PretrainedConfig) -> dict[str, Any]:
    """The window, the local frequencies, and a linear scaling of the global ones."""
    text: Any = config
    local = text.rope_parameters[_SLIDING]
    keys = {"attention.sliding_window": text.sliding_window, "rope.freq_base_swa": float(local["rope_theta"])}
    return keys | _caps(config)


def gemma3_arguments(keys: Keys) -> dict[str, Any]:
    """See `gemma3_keys`; every sixth layer attends to everything, and every layer where no window is said.

    llama.cpp knows no cap of Gemma 3's scores.
    """
    everywhere = {"rope_theta": keys.get("rope.freq_base", 10000.0)} | scaling_arguments(keys)
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
    return _gemma(keys, "gemma3", period=6) | {
        "rope_parameters": {_SLIDING: local, _FULL: everywhere},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.get("final_logit_softcapping") or None,
    }


def _caps(config: PretrainedConfig) -> dict[str, float]:
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    return {name: float(getattr(config, name)) for name in names if getattr(config, name)}


def _sliding(keys: Keys, architecture: str, period: int) -> list[bool]:
    """Which layers slide: all but every `period`-th, unless the file has another period, or a switch for each layer."""
    if architecture == "gemma3" and not keys.get("attention.sliding_window"):
        return [False] * keys["block_count"]
    pattern = keys.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):  # llama.cpp's layers beyond its end do not slide
        return [bool(slides) for slides in (pattern + [False] * keys["block_count"])[: keys["block_count"]]]
    return [pattern == 0 or bool((layer + 1) % pattern) for layer in range(keys["block_count"])]


def _gemma(keys: Keys, architecture: str, period: int) -> dict[str, Any]:
    """The window and its layers, and the scale of scores, which llama.cpp takes from the number of layers."""
    layers, heads = keys["block_count"], keys["attention.head_count"]
    shared = keys["embedding_length"] // heads
    large = layers == _LAYERS_OF_27B[architecture]
    return {
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "layer_types": [_SLIDING if slides else _FULL for slides in _sliding(keys, architecture, period)],
        "query_pre_attn_scalar": shared if large else keys.get("attention.key_length", shared),
    }
