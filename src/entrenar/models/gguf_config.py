"""A GGUF's hyper-parameters, from a transformers config and back, for every family of gguf_families.py."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from entrenar.core.errors import InputError
from entrenar.models.gguf_families import Family, family_in, family_of
from entrenar.models.gguf_rope import (
    LLAMA3,
    LONG,
    effective_rope,
    head_dim,
    rope_parameters,
    rope_tensors,
    rotary_dim,
    scaling_arguments,
    scaling_keys,
    set_rope_tensors,
)
from entrenar.models.gguf_values import check_computed, checked_keys

# Of a config, what does not change what the model computes, or what the tensors or the vocabulary say.
_SAID_ELSEWHERE = {
    *("initializer_range", "use_cache", "attention_dropout", "resid_pdrop", "embd_pdrop", "pretraining_tp"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_sliding_window", "max_window_layers", "no_rope_layer_interval", "_sliding_window_pattern"),
    *(PretrainedConfig().to_dict().keys() | {"model_type", "_name_or_path", "dtype"}),
}


def metadata_from_config(config: PretrainedConfig) -> dict[str, Any]:
    """The hyper-parameters of a GGUF, under their whole keys."""
    family = family_of(config)
    keys = _shared_keys(config) | scaling_keys(config) | family.more_keys(config)
    return {f"{family.architecture}.{key}": value for key, value in keys.items()}


def config_from_metadata(
    metadata: Mapping[str, Any], source: str, vocab_size: int, tied: bool, rope: Mapping[str, Tensor] | None = None
) -> PretrainedConfig:
    """A transformers config from GGUF keys.

    Args:
        rope: the file's rotary divisors by their names, see gguf_rope.py.

    Raises:
        InputError: an architecture that is not known, a key that is missing, divisors that are not understood.
    """
    family = family_in(metadata, source)
    prefix = f"{family.architecture}."
    keys = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    keys = checked_keys(keys, family.architecture, source)
    try:
        arguments = _shared_arguments(keys, family) | family.more_arguments(keys)
    except KeyError as missing:
        raise InputError(f"{source} lacks the key {prefix}{missing.args[0]}: export it again") from None
    check_computed(keys, family.architecture, LONG in (rope or {}), source)
    _check_scaling(keys, family, rope or {}, source)
    tokens = {f"{name}_token_id": index for name, index in special_ids(metadata, vocab_size).items()}
    config = AutoConfig.for_model(
        family.model_types[0], vocab_size=vocab_size, tie_word_embeddings=tied, **tokens, **arguments
    )
    set_rope_tensors(config, rope or {}, keys.get("rope.scaling.attn_factor"), source)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config


def special_ids(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, int | None]:
    """The ids of `bos`, `eos` and `pad` that a file names; None for one that is not among its tokens, as −1 is."""
    named = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {name: index if type(index) is int and 0 <= index < vocab_size else None for name, index in named.items()}


def _check_scaling(keys: dict[str, Any], family: Family, rope: Mapping[str, Tensor], source: str) -> None:
    """InputError for frequencies scaled in a way that the family is not read with."""
    for tensor, type in ((LLAMA3, "llama3"), (LONG, "longrope")):
        if tensor in rope and type not in family.rope_types:
            raise InputError(f"{source} has {tensor}, which the architecture {family.architecture} does not know")
    kind = keys.get("rope.scaling.type", "linear")  # llama.cpp's default where there is a factor
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0)) or 1
    if kind == "none" or (factor == 1 and kind != "longrope"):
        return
    # The divisors of longrope and Llama 3 are tensors; llama.cpp would scale by the factor beside them.
    twice = factor != 1 and (kind == "longrope" or LLAMA3 in rope)
    if kind not in family.rope_types or twice:
        raise InputError(
            f"{source} scales its rotary frequencies ({kind} by {factor}), which this version does not read in the "
            f"architecture {family.architecture}: load the model's Hugging Face directory"
        )


def check_exportable(config: PretrainedConfig) -> None:
    """InputError for a model that GGUF would hold as another one: what its keys give back is what they were made of."""
    family = family_of(config)
    text: Any = config
    rope = rope_parameters(config)
    if rope["rope_type"] not in family.rope_types:
        raise InputError(
            f"GGUF export of rope type {rope['rope_type']!r} is not in this version: of {config.model_type} it writes "
            f"{', '.join(family.rope_types)}"
        )
    keys = {"general.architecture": family.architecture, **metadata_from_config(config)}
    # Llama 3's divisors are written whatever they were made of.
    factors = {} if rope["rope_type"] == "llama3" else rope_tensors(config)
    back = config_from_metadata(keys, "the exported file", text.vocab_size, tied=True, rope=factors)
    names = CONFIG_MAPPING[config.model_type]().to_dict().keys() | {"head_dim"}
    for name in sorted(names - _SAID_ELSEWHERE):
        ours, theirs = _effective(name, config), _effective(name, back)
        if not _same(ours, theirs) and not (name == "rope_parameters" and rope["rope_type"] == "llama3"):
            raise InputError(
                f"GGUF export of {name} = {ours} is not in this version: llama.cpp would compute with {theirs} in its "
                f"architecture {family.architecture}; export to safetensors instead"
            )


def _effective(name: str, config: PretrainedConfig) -> Any:
    """A setting as far as it has an effect: not a window that no layer has, or that no text reaches beyond."""
    if name == "head_dim":
        return head_dim(config)
    if name == "rope_parameters":
        return effective_rope(config)
    value: Any = getattr(config, name, None)
    if name == "sliding_window" and value:
        text: Any = config
        layers = getattr(config, "layer_types", None) or ["sliding_attention"]
        return value if "sliding_attention" in layers and value < text.max_position_embeddings else None
    return value


def _shared_keys(config: PretrainedConfig) -> dict[str, Any]:
    text: Any = config
    head = head_dim(config)
    return {
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.freq_base": float(rope_parameters(config)["rope_theta"]),
        "rope.dimension_count": rotary_dim(config),
    }


def _shared_arguments(keys: dict[str, Any], family: Family) -> dict[str, Any]:
    heads = keys["attention.head_count"]
    evenly = keys["embedding_length"] // heads
    head = keys.get("attention.key_length", evenly) if family.own_head_size else evenly
    arguments = {
        "hidden_size": keys["embedding_length"],
        "intermediate_size": keys["feed_forward_length"],
        "num_hidden_layers": keys["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": keys.get("rope.freq_base", 10000.0)} | scaling_arguments(keys),
    }
    own = head != evenly or hasattr(CONFIG_MAPPING[family.model_types[0]], "head_dim")
    return arguments | ({"head_dim": head} if own else {})


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a config are the same; numbers to the precision of float32, as files hold them."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(one.get(key), other.get(key)) for key in one | other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other or not (one or other)
