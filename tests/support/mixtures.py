"""Tiny mixtures of experts, as transformers makes and saves them."""

from pathlib import Path

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

MIXTURES = ("mixtral", "qwen3_moe")


def make_mixture(name: str, vocabulary: int) -> PreTrainedModel:
    """A random one, the same every time; the second has a layer without experts."""
    shared = {
        "vocab_size": vocabulary, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 512,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mixtral":
            config = MixtralConfig(**shared, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2)  # pyright: ignore[reportArgumentType]
            return MixtralForCausalLM(config).eval()
        own = {
            "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 3,
            "head_dim": 16, "mlp_only_layers": [1],
        }  # fmt: skip
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shared, **own)).eval()  # pyright: ignore[reportArgumentType]


def save_mixture(name: str, directory: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model, saved."""
    model = make_mixture(name, len(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model
