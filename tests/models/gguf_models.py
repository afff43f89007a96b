"""Tiny random models of the families that GGUF holds, with settings that a file can say."""

from typing import Any

from families import make_family
from transformers import PreTrainedModel

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "tie_word_embeddings": True, "head_dim": 16},
    "qwen3": {},
}


def make_model(name: str, rows: int, **changes: Any) -> PreTrainedModel:
    """A tiny model of that family with `rows` embeddings; biases count, norms are bfloat16 as published ones are."""
    model = make_family(name, vocab_size=rows, **(MODELS[name] | changes))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.bfloat16().float()
    return model
