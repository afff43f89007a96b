"""The Llama family (Llama, Mistral, SmolLM) in GGUF: hyper-parameters, tensor names and the q/k permutation.

transformers rotates the two halves of a head, llama.cpp neighbouring pairs; so q and k rows are permuted on the way.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from entrenar.core.errors import InputError

ARCHITECTURE = "llama"
MODEL_TYPES = ("llama", "mistral")
ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# transformers → GGUF, the first three outside the layers.
_STEMS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def config_from_metadata(metadata: dict[str, Any], source: str, vocab_size: int, tied: bool) -> LlamaConfig:
    """A LlamaConfig from GGUF keys; InputError names a key that is missing, or an architecture that is not Llama."""
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise InputError(
            f"{source} has the architecture {architecture!r}: from GGUF, this version reads {ARCHITECTURE}"
        )

    def need(key: str) -> Any:
        if f"{ARCHITECTURE}.{key}" not in metadata:
            raise InputError(f"{source} lacks the key {ARCHITECTURE}.{key}: export it again")
        return metadata[f"{ARCHITECTURE}.{key}"]

    heads = need("attention.head_count")
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=need("embedding_length"),
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=metadata.get("llama.attention.key_length", need("embedding_length") // heads),
        max_position_embeddings=need("context_length"),
        rms_norm_eps=need("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings=tied,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def metadata_from_config(config: PretrainedConfig) -> dict[str, int | float]:
    """GGUF keys (without the architecture's prefix) from a Llama or Mistral config."""
    text: Any = config
    return {
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": text.num_hidden_layers,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.freq_base": float(text.rope_parameters["rope_theta"]),
        "rope.dimension_count": head_dim(config),
    }


def check_exportable(config: PretrainedConfig) -> None:
    """InputError for a model outside the family, or with a rotary scaling that is not written."""
    if config.model_type not in MODEL_TYPES:
        raise InputError(
            f"GGUF export of {config.model_type!r} is not in this version: it writes {', '.join(MODEL_TYPES)}"
        )
    rope_type = getattr(config, "rope_parameters", {}).get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise InputError(f"GGUF export of rope type {rope_type!r} is not in this version: it writes default and llama3")
    if getattr(config, "sliding_window", None):
        raise InputError("GGUF export of a sliding window is not in this version: llama.cpp would attend to all tokens")


def head_dim(config: PretrainedConfig) -> int:
    """Dimensions of one attention head."""
    text: Any = config
    return getattr(config, "head_dim", None) or text.hidden_size // text.num_attention_heads


def gguf_name(hf_name: str) -> str | None:
    """The GGUF name of a transformers parameter, or None when the family has none for it."""
    return _rename(hf_name, _STEMS, r"model\.layers\.(\d+)\.", "blk.{}.")


def hf_name(gguf_name: str) -> str | None:
    """The transformers name of a GGUF tensor, or None when the family has none for it."""
    return _rename(gguf_name, {ours: theirs for theirs, ours in _STEMS.items()}, r"blk\.(\d+)\.", "model.layers.{}.")


def _rename(name: str, stems: dict[str, str], layer: str, prefix: str) -> str | None:
    match = re.fullmatch(rf"({layer})?(.+)\.(weight|bias)", name)
    if match is None or match[3] not in stems:
        return None
    return (prefix.format(match[2]) if match[1] else "") + f"{stems[match[3]]}.{match[4]}"


def to_gguf(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """transformers' row order → llama.cpp's, for q and k; other tensors pass."""
    return _swap(tensor, 2, head_dim(config) // 2) if is_rotary(name) else tensor


def from_gguf(name: str, tensor: Tensor, config: PretrainedConfig) -> Tensor:
    """llama.cpp's row order → transformers', for q and k, whole or the rows of some heads; other tensors pass."""
    return _swap(tensor, head_dim(config) // 2, 2) if is_rotary(name) else tensor


def _swap(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """In every outer · inner rows, those of (outer, inner) in the order of (inner, outer)."""
    return tensor.reshape(-1, outer, inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def is_rotary(hf_name: str) -> bool:
    """Whether the rows of each head are in another order there."""
    return ".q_proj." in hf_name or ".k_proj." in hf_name


def set_rope_factors(config: LlamaConfig, factors: Tensor, source: str) -> None:
    """Let a config say what a GGUF's divisors (head_dim / 2,) say: Llama 3.x's, of which only `factor` varies.

    Raises:
        InputError: other divisors, which no config of transformers could say.
    """
    plain: dict[str, Any] = dict(config.rope_parameters or {})
    scaling = {"rope_type": "llama3", "factor": factors.max().item(), **_LLAMA3_ROPE}
    config.rope_parameters = plain | scaling  # pyright: ignore[reportAttributeAccessIssue]
    made = rope_factors(config)
    if made is None or made.shape != factors.shape or not torch.allclose(made, factors.float(), rtol=1e-4):
        raise InputError(f"{source} has rotary factors that are not Llama 3's: load the model's Hugging Face directory")


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """Llama 3's per-frequency divisors, (head_dim / 2,) float32, or None for plain rotary embeddings.

    Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1 release).
    """
    rope: dict[str, Any] = config.rope_parameters  # pyright: ignore[reportAttributeAccessIssue]
    if rope.get("rope_type") != "llama3":
        return None
    dim = head_dim(config)
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    wavelength = 2 * math.pi / frequency
    context = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return 1.0 / ((1 - smooth) / rope["factor"] + smooth)
