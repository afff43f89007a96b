"""Tiny random models of the families that GGUF holds, with settings that a file can say."""

from copy import deepcopy
from typing import Any

from transformers import PreTrainedModel

from tests.support.families import make_family

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "tie_word_embeddings": True, "head_dim": 16},
    "qwen3": {},
    "phi3": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 5},
    "gemma2": {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {
        "query_pre_attn_scalar": 32, "num_hidden_layers": 7,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 200000.0, "factor": 8.0},
        },
    },
}  # fmt: skip

LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.25, 1.5, 3.0], "long_factor": [1.0, 4.0, 16.0, 50.0],
    "original_max_position_embeddings": 256,
}  # fmt: skip
PHI3_LONG: dict[str, Any] = {
    "rope_parameters": LONGROPE, "max_position_embeddings": 4096, "original_max_position_embeddings": 256,
}  # fmt: skip


def make_model(name: str, rows: int, **changes: Any) -> PreTrainedModel:
    """A tiny model of that family with `rows` embeddings; biases count, norms are bfloat16 as published ones are."""
    model = make_family(name, vocab_size=rows, **deepcopy(MODELS[name] | changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.bfloat16().float()
    return model
