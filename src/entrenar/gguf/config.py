"""A GGUF's hyper-parameters, from a transformers config and back, for every family of families.py."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from entrenar.core.errors import InputError
from entrenar.gguf.families import Family, family_in, family_of
from entrenar.gguf.rope import (
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
from entrenar.gguf.special_tokens import named_ids
from entrenar.gguf.values import check_computed, checked_keys

_LAYER = re.compile(r"blk\.(\d{1,4})\.")
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
        rope: the file's rotary divisors by their names, see rope.py.

    Raises:
        InputError: an architecture that is not known, a key that is missing, or has a value that is not computed with,
            divisors that are not understood.
    """
    family, keys = _keys_of(metadata, source)
    config = _config(family, keys, metadata, source, vocab_size, tied, rope or {})
    check_computed(keys, family, LONG in (rope or {}), source)
    return config


def _keys_of(metadata: Mapping[str, Any], source: str) -> tuple[Family, dict[str, Any]]:
    """The row of a file's architecture, and its keys without that prefix."""
    family = family_in(metadata, source)
    prefix = f"{family.architecture}."
    keys = {key.removeprefix(prefix): metadata[key] for key in metadata if key.startswith(prefix)}
    return family, checked_keys(keys, family.architecture, source)


def _config(
    family: Family, keys: dict[str, Any], metadata: Mapping[str, Any], source: str, vocab_size: int, tied: bool,
    rope: Mapping[str, Tensor],
) -> PretrainedConfig:  # fmt: skip
    try:
        arguments = _shared_arguments(keys, family) | family.more_arguments(keys)
    except KeyError as missing:
        raise InputError(f"{source} lacks the key {family.architecture}.{missing.args[0]}: export it again") from None
    _check_scaling(keys, family, rope, source)
    tokens = _token_ids(metadata, vocab_size)
    config = AutoConfig.for_model(
        family.model_types[0], vocab_size=vocab_size, tie_word_embeddings=tied, **tokens, **arguments
    )
    set_rope_tensors(config, rope, keys.get("rope.scaling.attn_factor"), source)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config


def _token_ids(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, int | None]:
    ids = named_ids(metadata, vocab_size)
    names = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    return {f"{name}_token_id": ids.get(key) for name, key in names}


def check_layers(metadata: Mapping[str, Any], names: Iterable[str], source: str) -> None:
    """InputError unless a file holds tensors of exactly the layers that it says: before anything is built of them."""
    family, keys = _keys_of(metadata, source)
    experts = sorted(name for name in names if "_exps." in name)
    if experts:
        raise InputError(
            f"{source} is a mixture of experts ({experts[0]}), which this version does not read from GGUF: load the "
            "model's Hugging Face directory"
        )
    layers = {int(match[1]) for match in map(_LAYER.match, names) if match}
    said = keys.get("block_count")
    if said is not None and layers != set(range(said)):
        raise InputError(
            f"{source} says {said} layers ({family.architecture}.block_count), but holds tensors of {len(layers)}, the "
            f"last of number {max(layers, default=None)} (the first is 0): fetch it again"
        )


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
    metadata = {"general.architecture": family.architecture, **metadata_from_config(config)}
    # Llama 3's divisors are written whatever they were made of.
    factors = {} if rope["rope_type"] == "llama3" else rope_tensors(config)
    _, keys = _keys_of(metadata, "the exported file")
    back = _config(family, keys, metadata, "the exported file", text.vocab_size, True, factors)
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
    is_stated = head != evenly or hasattr(CONFIG_MAPPING[family.model_types[0]], "head_dim")
    return arguments | ({"head_dim": head} if is_stated else {})


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a config are the same; numbers to the precision of float32, as files hold them."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_same(one.get(key), other.get(key)) for key in one | other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other or not (one or other)
