"""Tiny random models of the families we promise to train, by name."""

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


# Architectures that do not keep documents of one row apart: they know no positions; do not hand them on to the mask;
# carry a recurrent state along, one strongly, one weakly.
MIXING: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "recurrent_gemma": {"lru_width": 64, "head_dim": 16},
    "jamba": {"use_mamba_kernels": False},
}


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
