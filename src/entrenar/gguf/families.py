"""The families that are read from and written as GGUF: one row each, for models and adapters alike.

A row says which transformers models an architecture of llama.cpp holds, what their tensors are called there, and how
their values differ: rows of q and k in another order where llama.cpp rotates neighbouring pairs and transformers the
two halves of a head, norms with their 1 already added (docs/decisions/0014).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from entrenar.core.errors import InputError
from entrenar.gguf import keys as gguf_keys
from entrenar.gguf.keys import Keys
from entrenar.gguf.rope import head_dim

# transformers → GGUF, the first three outside the layers.
_SHARED = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_APART = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
}  # fmt: skip
_LLAMA = {**_SHARED, **_APART, "post_attention_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_PHI3 = {
    **_SHARED, "post_attention_layernorm": "ffn_norm", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
_GEMMA = {
    **_SHARED, **_APART, "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_TIED_GEMMA = {theirs: ours for theirs, ours in _GEMMA.items() if theirs != "lm_head"}  # Gemma 2 has no other there
# A switch of a config → the biases it is of; Qwen 2 has those of q, k and v without a switch.
BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}
_BY_KEYS = ("default", "linear", "yarn")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of llama.cpp; `norm_offset` is what its norms' weights have added to them there."""

    architecture: str
    model_types: tuple[str, ...]  # the first is what a file is read as
    stems: dict[str, str]
    rope_types: tuple[str, ...] = ("default",)
    rotates_pairs: bool = False
    norm_offset: float = 0.0
    own_head_size: bool = True  # False: llama.cpp knows no heads but those that share the width evenly
    more_keys: Callable[[PretrainedConfig], dict[str, Any]] = gguf_keys.no_more
    more_arguments: Callable[[Keys], dict[str, Any]] = gguf_keys.no_arguments

    def gguf_name(self, hf_name: str) -> str | None:
        """The GGUF name of a transformers parameter, or None when the family has none for it."""
        return _rename(hf_name, self.stems, r"model\.layers\.(\d+)\.", "blk.{}.")

    def hf_name(self, gguf_name: str) -> str | None:
        """The transformers name of a GGUF tensor, or None when the family has none for it."""
        stems = {ours: theirs for theirs, ours in self.stems.items()}
        return _rename(gguf_name, stems, r"blk\.(\d+)\.", "model.layers.{}.")

    def reorders(self, hf_name: str) -> bool:
        """Whether the rows of each head are in another order there."""
        return self.rotates_pairs and (".q_proj." in hf_name or ".k_proj." in hf_name)

    def offset(self, hf_name: str) -> float:
        """What a GGUF adds to the values of this parameter."""
        return self.norm_offset if hf_name.endswith("norm.weight") else 0.0

    def to_gguf(self, name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
        """A transformers parameter, or the B of an adapter of it, as llama.cpp has it."""
        if self.reorders(name):
            return _swap(tensor, 2, head_dim(config) // 2)
        return tensor.float() + self.offset(name) if self.offset(name) else tensor

    def in_our_order(self, tensor: Tensor, config: PretrainedConfig) -> Tensor:
        """llama.cpp's row order → transformers', of a tensor that it `reorders`, whole or the rows of some heads."""
        return _swap(tensor, head_dim(config) // 2, 2)


FAMILIES = {
    row.architecture: row
    for row in (
        Family(
            architecture="llama", model_types=("llama", "mistral"), stems=_LLAMA, rotates_pairs=True,
            rope_types=("default", "llama3", "linear", "yarn"),
        ),
        Family(architecture="qwen2", model_types=("qwen2",), stems=_LLAMA, own_head_size=False, rope_types=_BY_KEYS),
        Family(architecture="qwen3", model_types=("qwen3",), stems=_LLAMA | _HEAD_NORMS, rope_types=_BY_KEYS),
        Family(
            architecture="phi3", model_types=("phi3",), stems=_PHI3, rope_types=("default", "longrope"),
            own_head_size=False, more_keys=gguf_keys.phi3_keys, more_arguments=gguf_keys.phi3_arguments,
        ),
        Family(
            architecture="smollm3", model_types=("smollm3",), stems=_LLAMA, rotates_pairs=True, rope_types=_BY_KEYS,
            more_arguments=gguf_keys.smollm3_arguments,
        ),
        Family(
            architecture="gemma2", model_types=("gemma2",), stems=_TIED_GEMMA, norm_offset=1.0,
            more_keys=gguf_keys.gemma2_keys, more_arguments=gguf_keys.gemma2_arguments,
        ),
        Family(
            architecture="gemma3", model_types=("gemma3_text",), stems=_GEMMA | _HEAD_NORMS, norm_offset=1.0,
            rope_types=("default", "linear"), more_keys=gguf_keys.gemma3_keys,
            more_arguments=gguf_keys.gemma3_arguments,
        ),
    )
}  # fmt: skip


def family_of(config: PretrainedConfig) -> Family:
    """The row that a model is written as; InputError lists the models there are."""
    for row in FAMILIES.values():
        if config.model_type in row.model_types:
            return row
    known = ", ".join(model_type for row in FAMILIES.values() for model_type in row.model_types)
    raise InputError(f"GGUF export of {config.model_type!r} is not in this version: it writes {known}")


def family_in(metadata: Mapping[str, Any], source: str) -> Family:
    """The row of a GGUF's architecture; InputError lists the architectures there are."""
    architecture = metadata.get("general.architecture")
    if architecture not in FAMILIES:
        raise InputError(
            f"{source} has the architecture {architecture!r}: from GGUF, this version reads {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]


def has_stem(gguf_name: str, stems: tuple[str, ...], kind: str) -> bool:
    """Whether a tensor is the `kind` (weight or bias) of one of these in some layer."""
    return any(gguf_name.endswith(f".{stem}.{kind}") for stem in stems)


def has_bias(config: PretrainedConfig, gguf_name: str) -> bool:
    """Whether the class of a config has this bias, by its name in GGUF."""
    if config.model_type == "qwen2":
        return has_stem(gguf_name, ("attn_q", "attn_k", "attn_v"), "bias")
    return any(
        getattr(config, switch, False) and has_stem(gguf_name, stems, "bias") for switch, stems in BIASES.items()
    )


def _rename(name: str, stems: dict[str, str], layer: str, prefix: str) -> str | None:
    match = re.fullmatch(rf"({layer})?(.+)\.(weight|bias)", name)
    if match is None or match[3] not in stems:
        return None
    return (prefix.format(match[2]) if match[1] else "") + f"{stems[match[3]]}.{match[4]}"


def _swap(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """In every outer · inner rows, those of (outer, inner) in the order of (inner, outer)."""
    return tensor.reshape(-1, outer, inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
