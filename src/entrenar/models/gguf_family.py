"""What a family of models is in a GGUF: its architecture's name, tensor names, row order, and hyper-parameters.

Names and keys are those of llama.cpp's converter (convert_hf_to_gguf.py) and of the gguf package. The families
themselves are rows in gguf_families.py. Letters: D dimensions of an attention head.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from entrenar.core.errors import InputError

# transformers → GGUF, the first three outside the layers.
STEMS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# GGUF key → the config's attribute, of every family.
_KEYS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
_OPTIONAL = ("attention.head_count_kv",)
_WHOLE_MODEL = r"model\.layers\.(\d+)\."

Metadata = Mapping[str, Any]
Values = dict[str, Any]


def nothing_more(_: Any) -> Values:
    """For a family whose configs and keys hold nothing beside what all have."""
    return {}


@dataclass(frozen=True)
class Family:
    """One architecture of GGUF.

    model_types: transformers' names of the models that it holds; a file is read as the first. keys: more GGUF keys and
    the attributes they hold, absent where the attribute is None. permutes: whether q and k rows are in another order.
    norm_offset: what a norm's weight in the file has more than transformers' own. ropes: kinds of rotary embedding that
    are written. fixed: attributes that llama.cpp takes as given, from a config → what they must be. to_keys: config →
    more keys; from_keys: keys → more arguments of the config.
    """

    architecture: str
    model_types: tuple[str, ...]
    stems: Mapping[str, str] = field(default_factory=lambda: STEMS)
    keys: Mapping[str, str] = field(default_factory=dict)
    permutes: bool = False
    norm_offset: float = 0.0
    activation: str = "silu"
    ropes: tuple[str, ...] = ("default",)
    fixed: Callable[[Any], Values] = nothing_more
    to_keys: Callable[[Any], Values] = nothing_more
    from_keys: Callable[[Metadata], Values] = nothing_more

    def gguf_name(self, hf_name: str) -> str | None:
        """The GGUF name of a transformers parameter, or None when the family has none for it."""
        return _rename(hf_name, self.stems, _WHOLE_MODEL, "blk.{}.")

    def hf_name(self, gguf_name: str) -> str | None:
        """The transformers name of a GGUF tensor, or None when the family has none for it."""
        stems = {ours: theirs for theirs, ours in self.stems.items()}
        return _rename(gguf_name, stems, r"blk\.(\d+)\.", "model.layers.{}.")

    def is_rotary(self, hf_name: str) -> bool:
        """Whether the rows of each head are in another order there: llama.cpp rotates neighbouring pairs, where
        transformers rotates the two halves of a head."""
        return self.permutes and (".q_proj." in hf_name or ".k_proj." in hf_name)

    def to_gguf(self, name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
        """A parameter as the file has it; a tensor of bytes has its rows reordered alone."""
        if self.is_rotary(name):
            return _swap(tensor, 2, head_dim(config) // 2)
        offset = self._offset(name)
        return tensor + offset if offset and tensor.is_floating_point() else tensor

    def from_gguf(self, name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
        """A tensor of the file, whole or the rows of some heads, as transformers has it."""
        if self.is_rotary(name):
            return _swap(tensor, head_dim(config) // 2, 2)
        offset = self._offset(name)
        return tensor - offset if offset and tensor.is_floating_point() else tensor

    def _offset(self, hf_name: str) -> float:
        return self.norm_offset if hf_name.endswith("norm.weight") else 0.0

    def metadata(self, config: Any) -> Values:
        """Keys, without the architecture's prefix."""
        dim = head_dim(config)
        values = {key: getattr(config, name) for key, name in (_KEYS | dict(self.keys)).items()}
        values |= {"attention.key_length": dim, "attention.value_length": dim, "vocab_size": config.vocab_size}
        values |= {"rope.freq_base": float(main_rope(config)["rope_theta"]), "rope.dimension_count": dim}
        values |= self.to_keys(config)
        return {key: value for key, value in values.items() if value is not None}

    def config(self, metadata: Metadata, source: str, vocab_size: int, tied: bool) -> Any:
        """A config from a file's keys; InputError names a key that is missing."""
        own = {
            key.removeprefix(f"{self.architecture}."): value
            for key, value in metadata.items()
            if key.startswith(f"{self.architecture}.")
        }
        missing = [key for key in _KEYS if key not in own and key not in _OPTIONAL]
        if missing:
            raise InputError(f"{source} lacks the key {self.architecture}.{missing[0]}: export it again")
        heads = own["attention.head_count"]
        own.setdefault("attention.head_count_kv", heads)
        values = {name: own[key] for key, name in (_KEYS | dict(self.keys)).items() if key in own}
        values["head_dim"] = own.get("attention.key_length", own["embedding_length"] // heads)
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
        special = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        values |= {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
        values |= self.from_keys(own)
        made = AutoConfig.for_model(self.model_types[0], vocab_size=vocab_size, tie_word_embeddings=tied, **values)
        made.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_types[0]]]
        return made

    def check(self, config: Any) -> None:
        """InputError for what llama.cpp would compute in another way than transformers."""
        rope_type = main_rope(config).get("rope_type", "default")
        if rope_type not in self.ropes:
            raise InputError(
                f"GGUF export of rope type {rope_type!r} is not in this version: for {self.architecture} it writes "
                f"{' and '.join(self.ropes)}"
            )
        window = getattr(config, "sliding_window", None)
        if "sliding_window" not in self.keys.values() and window and window < config.max_position_embeddings:
            raise InputError(
                "GGUF export of a sliding window is not in this version: llama.cpp would attend to all tokens"
            )
        fixed = self.fixed(config) | {"activation": self.activation}
        for name, value in fixed.items():
            found = _activation(config) if name == "activation" else getattr(config, name)
            if found != value:
                raise InputError(
                    f"GGUF export of {config.model_type} with {name} {found!r} is not in this version: llama.cpp takes "
                    f"{value!r} as given for this size"
                )


def _activation(config: Any) -> str:
    return getattr(config, "hidden_act", None) or config.hidden_activation


def main_rope(config: Any) -> Values:
    """The rotary parameters: of the layers with full attention, where there are others."""
    rope: Values = config.rope_parameters
    return rope.get("full_attention", rope)


def head_dim(config: PretrainedConfig) -> int:
    """Dimensions of one attention head."""
    text: Any = config
    return getattr(config, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _rename(name: str, stems: Mapping[str, str], layer: str, prefix: str) -> str | None:
    match = re.fullmatch(rf"({layer})?(.+)\.(weight|bias)", name)
    if match is None or match[3] not in stems:
        return None
    return (prefix.format(match[2]) if match[1] else "") + f"{stems[match[3]]}.{match[4]}"


def _swap(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """In every outer · inner rows, those of (outer, inner) in the order of (inner, outer)."""
    return tensor.reshape(-1, outer, inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
