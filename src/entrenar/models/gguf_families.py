"""The families that are read from GGUF and written as GGUF, a row each."""

import math
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from entrenar.core.errors import InputError
from entrenar.models.gguf_family import STEMS, Family, Metadata, Values, head_dim, main_rope

_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA_STEMS = STEMS | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_PHI3_STEMS = {name: stem for name, stem in STEMS.items() if not name.startswith(("self_attn.", "mlp."))} | {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
}  # fmt: skip
_GEMMA3_LOCAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _as_by_default(config: Any, *names: str) -> Values:
    """What a config of this many layers has in these attributes unless told otherwise."""
    made = AutoConfig.for_model(config.model_type, num_hidden_layers=config.num_hidden_layers)
    return {name: getattr(made, name) for name in names}


# Of Gemma's sizes one each, told by its number of layers, scales scores by the width of a head's share of the hidden
# state and not by the head's own (llama.cpp, `f_attention_scale`).
_GEMMA_27B = (46, 62)


def _gemma_scalar(layers: int, hidden: int, heads: int, dim: int) -> int:
    return hidden // heads if layers in _GEMMA_27B else dim


def _gemma_fixed(config: Any) -> Values:
    scalar = _gemma_scalar(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, head_dim(config)
    )  # fmt: skip
    return {"query_pre_attn_scalar": scalar} | _as_by_default(config, "layer_types")


def _gemma_arguments(keys: Metadata) -> Values:
    heads, hidden = keys["attention.head_count"], keys["embedding_length"]
    dim = keys.get("attention.key_length", hidden // heads)
    return {"query_pre_attn_scalar": _gemma_scalar(keys["block_count"], hidden, heads, dim)}


def _gemma3_fixed(config: Any) -> Values:
    return _gemma_fixed(config) | {
        "rope_parameters": {"full_attention": main_rope(config), "sliding_attention": _GEMMA3_LOCAL_ROPE},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _gemma3_keys(config: Any) -> Values:
    rope = main_rope(config)
    linear = rope.get("rope_type") == "linear"
    return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])} if linear else {}


def _gemma3_arguments(keys: Metadata) -> Values:
    main: Values = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 1_000_000.0)}
    if keys.get("rope.scaling.type") == "linear":
        main |= {"rope_type": "linear", "factor": keys["rope.scaling.factor"]}
    return _gemma_arguments(keys) | {
        "rope_parameters": {"full_attention": main, "sliding_attention": dict(_GEMMA3_LOCAL_ROPE)}
    }


def _phi3_keys(config: Any) -> Values:
    rope = main_rope(config)
    found: Values = {"rope.dimension_count": int(head_dim(config) * rope.get("partial_rotary_factor", 1.0))}
    if rope.get("rope_type") == "longrope":
        original = config.original_max_position_embeddings
        stretch = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        found |= {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}
    return found


def _phi3_arguments(keys: Metadata) -> Values:
    dim = keys.get("attention.key_length", keys["embedding_length"] // keys["attention.head_count"])
    rope = {
        "rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0),
        "partial_rotary_factor": keys.get("rope.dimension_count", dim) / dim,
    }  # fmt: skip
    original = keys.get("rope.scaling.original_context_length", keys["context_length"])
    # llama.cpp's converter writes 0 for no window.
    window = keys.get("attention.sliding_window") or None
    return {"rope_parameters": rope, "original_max_position_embeddings": original, "sliding_window": window}


FAMILIES = (
    Family("llama", ("llama", "mistral"), permutes=True, ropes=("default", "llama3")),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",), stems=STEMS | _HEAD_NORMS),
    Family(
        "smollm3", ("smollm3",), permutes=True, ropes=("default", "llama3"),
        fixed=lambda config: _as_by_default(config, "no_rope_layers"),
    ),
    Family(
        "phi3", ("phi3",), stems=_PHI3_STEMS, keys=_WINDOW, ropes=("default", "longrope"),
        to_keys=_phi3_keys, from_keys=_phi3_arguments,
    ),
    Family(
        "gemma2", ("gemma2",), stems=_GEMMA_STEMS, keys=_WINDOW | _SOFTCAPS, norm_offset=1.0,
        activation="gelu_pytorch_tanh", fixed=_gemma_fixed, from_keys=_gemma_arguments,
    ),
    Family(
        "gemma3", ("gemma3_text",), stems=_GEMMA_STEMS | _HEAD_NORMS, keys=_WINDOW, norm_offset=1.0,
        activation="gelu_pytorch_tanh", ropes=("default", "linear"), fixed=_gemma3_fixed,
        to_keys=_gemma3_keys, from_keys=_gemma3_arguments,
    ),
)  # fmt: skip
_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}
_BY_MODEL_TYPE = {name: family for family in FAMILIES for name in family.model_types}


def family_of_file(metadata: Metadata, source: str) -> Family:
    """The family of a GGUF's keys; InputError for an architecture that is not known."""
    architecture = metadata.get("general.architecture")
    if architecture not in _BY_ARCHITECTURE:
        known = ", ".join(_BY_ARCHITECTURE)
        raise InputError(f"{source} has the architecture {architecture!r}: from GGUF, this version reads {known}")
    return _BY_ARCHITECTURE[architecture]


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model that is written as GGUF.

    Raises:
        InputError: a model of no family, or one that llama.cpp would compute in another way.
    """
    family = _BY_MODEL_TYPE.get(config.model_type)
    if family is None:
        raise InputError(
            f"GGUF export of {config.model_type!r} is not in this version: it writes {', '.join(_BY_MODEL_TYPE)}"
        )
    family.check(config)
    return family
