"""Rotary frequencies that a GGUF holds as tensors of divisors: Llama 3's, and LongRoPE's two sets.

`rope_freqs.weight` (D / 2,); `rope_factors_long.weight` and `rope_factors_short.weight` (R / 2,) of R rotated
dimensions, of which llama.cpp takes the long ones where its context is longer than the original one.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from entrenar.core.errors import InputError
from entrenar.models.gguf_family import head_dim, main_rope

LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
NAMES = (LLAMA3, LONG, SHORT)
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def factor_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """The divisors of a config as a GGUF has them, float32; none for plain rotary embeddings."""
    rope = main_rope(config)
    if rope.get("rope_type") == "llama3":
        return {LLAMA3: _llama3(config, rope)}
    if rope.get("rope_type") == "longrope":
        return {name: torch.tensor(rope[key]) for name, key in ((LONG, "long_factor"), (SHORT, "short_factor"))}
    return {}


def set_factors(config: PretrainedConfig, found: dict[str, Tensor], source: str) -> None:
    """Let a config say what the divisors in a file say.

    Raises:
        InputError: divisors that no config of transformers could say.
    """
    text: Any = config
    if LONG in found and SHORT in found:
        text.rope_parameters = text.rope_parameters | {
            "rope_type": "longrope", "long_factor": found[LONG].tolist(), "short_factor": found[SHORT].tolist(),
        }  # fmt: skip
    elif LLAMA3 in found:
        # Of Llama 3.x's parameters only `factor` varies, and the longest wavelengths are divided by it.
        scaling = {"rope_type": "llama3", "factor": found[LLAMA3].max().item(), **_LLAMA3_ROPE}
        text.rope_parameters = text.rope_parameters | scaling
        made = factor_tensors(config)[LLAMA3]
        if made.shape != found[LLAMA3].shape or not torch.allclose(made, found[LLAMA3].float(), rtol=1e-4):
            raise InputError(
                f"{source} has rotary factors that are not Llama 3's: load the model's Hugging Face directory"
            )


def _llama3(config: PretrainedConfig, rope: dict[str, Any]) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1 release)."""
    dim = head_dim(config)
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    wavelength = 2 * math.pi / frequency
    context = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return 1.0 / ((1 - smooth) / rope["factor"] + smooth)
