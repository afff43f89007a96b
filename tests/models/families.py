"""Tiny random models of the families we promise to train, by name."""

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma": {},
    "gemma2": {"sliding_window": 5},
    "gemma3_text": {"sliding_window": 5},
    "phi3": {"sliding_window": None, "partial_rotary_factor": 0.5},
    "granite": {},
    "cohere": {},
}
# Those that GGUF holds, as llama.cpp computes them: whole heads, its own patterns of layers, windows that matter.
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
    "short_factor": [1 + n / 10 for n in range(16)], "long_factor": [2 + n / 5 for n in range(16)],
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LINEAR: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
_GEMMA: dict[str, Any] = {"sliding_window": 8, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
GGUF_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "sliding_window": None}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 4}),
    "phi3": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 128}),
    "phi3, LongRoPE": (
        "phi3",
        {"sliding_window": None, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 64},
    ),
    "gemma2": ("gemma2", _GEMMA | {"num_hidden_layers": 3}),
    "gemma3": ("gemma3_text", _GEMMA | {"num_hidden_layers": 7}),
    "gemma3, linear": ("gemma3_text", _GEMMA | {"num_hidden_layers": 7, "rope_parameters": _LINEAR}),
}


# Architectures that do not keep documents of one row apart: they know no positions; do not hand them on to the mask;
# carry a recurrent state along, one strongly, one weakly.
MIXING: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "recurrent_gemma": {"lru_width": 64, "head_dim": 16},
    "jamba": {"use_mamba_kernels": False},
}


def make_gguf_family(case: str, vocabulary: int) -> PreTrainedModel:
    """A model of GGUF_FAMILIES for a tokenizer of so many words."""
    name, changes = GGUF_FAMILIES[case]
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_family(name, **(sizes | deepcopy(changes)))


def make_family(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of that family with random weights, the same every time."""
    config = AutoConfig.for_model(name, **(_SHAPE | (FAMILIES | MIXING)[name] | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for module in model.modules():  # norms start as ones or zeros: make every one of their weights count
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.dim() == 1:
                torch.nn.init.normal_(weight, mean=weight.detach().mean().item(), std=0.3)
    return model.eval()
