"""How a GGUF says that rotary frequencies are scaled: by keys (linear, YaRN), or by divisors that it holds as tensors:
Llama 3's `rope_freqs`, and longrope's two of Phi-3 and Phi-4, one float32 for every pair of rotated dimensions.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from entrenar.core.errors import InputError

LLAMA3, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (LLAMA3, LONG, SHORT)
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def head_dim(config: PretrainedConfig) -> int:
    """Dimensions of one attention head."""
    text: Any = config
    return getattr(config, "head_dim", None) or text.hidden_size // text.num_attention_heads


def rotary_dim(config: PretrainedConfig) -> int:
    """Dimensions of a head that are rotated."""
    return int(head_dim(config) * rope_parameters(config).get("partial_rotary_factor", 1.0))


def rope_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """GGUF name → divisors (rotary_dim / 2,) float32; none for plain rotary embeddings."""
    rope = rope_parameters(config)
    if rope.get("rope_type") == "llama3":
        return {LLAMA3: _llama3_factors(config, rope)}
    if rope.get("rope_type") == "longrope":
        return {LONG: torch.tensor(rope["long_factor"]), SHORT: torch.tensor(rope["short_factor"])}
    return {}


def set_rope_tensors(
    config: PretrainedConfig, tensors: Mapping[str, Tensor], attention_factor: float | None, source: str
) -> None:
    """Let a config say what a GGUF's divisors say.

    Args:
        attention_factor: longrope's, what cos and sin are multiplied by; None where the file does not say.

    Raises:
        InputError: divisors, which no config of transformers could say; one of longrope's two without the other.
    """
    if LLAMA3 in tensors and len(tensors) > 1:
        raise InputError(f"{source} has rotary factors of two kinds, {' and '.join(tensors)}: export it again")
    if LLAMA3 in tensors:
        _set_llama3(config, tensors[LLAMA3], source)
    elif tensors:
        _set_longrope(config, tensors, attention_factor, source)


def attention_factor(config: PretrainedConfig) -> float:
    """What longrope multiplies cos and sin by: its own, or √(1 + ln scale / ln original) (LongRoPE, section 3.3)."""
    rope, text = rope_parameters(config), config.to_dict()
    original = rope["original_max_position_embeddings"]
    scale = rope.get("factor") or text["max_position_embeddings"] / original
    stated = rope.get("attention_factor")
    return stated or (math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)


def scaling_keys(config: PretrainedConfig) -> dict[str, Any]:
    """The GGUF keys of linear scaling or YaRN (arXiv 2309.00071); empty for any other kind of RoPE."""
    rope = rope_parameters(config)
    if rope["rope_type"] not in ("linear", "yarn"):
        return {}
    keys = {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "linear":
        return keys
    return keys | {
        "rope.scaling.original_context_length": _original_context(config, rope),
        # Without a key llama.cpp multiplies the scores by YaRN's factor; the key is what comes on top of it.
        "rope.scaling.attn_factor": _yarn_attention(rope) / _yarn_scale(rope["factor"]),
    }


def scaling_arguments(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `scaling_keys`: rotary settings, the default ones where no key is there."""
    kind = keys.get("rope.scaling.type", "linear")  # llama.cpp's default where there is a factor
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0)) or 1.0
    attention = keys.get("rope.scaling.attn_factor", 1.0)
    if kind == "yarn" and (factor, attention) != (1.0, 1.0):
        original = keys.get("rope.scaling.original_context_length", keys["context_length"])
        return {
            "rope_type": "yarn", "factor": factor, "attention_factor": attention * _yarn_scale(factor),
            "original_max_position_embeddings": original,
        }  # fmt: skip
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else {"rope_type": "default"}


def _yarn_scale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(rope: Mapping[str, Any]) -> float:
    """What YaRN multiplies cos and sin by: its own, DeepSeek's ratio of two, or 1 + ln factor / 10 (equation 22)."""
    if rope.get("attention_factor"):
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _yarn_scale(rope["factor"], rope["mscale"]) / _yarn_scale(rope["factor"], rope["mscale_all_dim"])
    return _yarn_scale(rope["factor"])


def _original_context(config: PretrainedConfig, rope: Mapping[str, Any]) -> int:
    return rope.get("original_max_position_embeddings") or config.to_dict()["max_position_embeddings"]


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary settings; for an architecture with several, those of layers that attend to everything."""
    rope: dict[str, Any] = config.rope_parameters  # pyright: ignore[reportAttributeAccessIssue]
    return rope.get("full_attention", rope)


def effective_rope(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary settings in one form, so that equal ones compare equal: what follows from others is computed."""
    rope: dict[str, Any] = config.rope_parameters  # pyright: ignore[reportAttributeAccessIssue]
    if rope.get("rope_type") == "longrope":
        rope = {key: value for key, value in rope.items() if key != "factor"}
        rope["attention_factor"] = attention_factor(config)
    if rope.get("rope_type") == "yarn":
        said = {key: value for key, value in rope.items() if "mscale" not in key and value is not None}
        rope = {"beta_fast": 32, "beta_slow": 1, "truncate": True} | said
        rope["attention_factor"] = _yarn_attention(rope_parameters(config))
        rope["original_max_position_embeddings"] = _original_context(config, rope)
    spoken = {key: value | {"type": None} if isinstance(value, dict) else value for key, value in rope.items()}
    return {"partial_rotary_factor": 1.0} | spoken | {"type": None}


def _set(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    config.rope_parameters = rope_parameters(config) | changes  # pyright: ignore[reportAttributeAccessIssue]


def _set_llama3(config: PretrainedConfig, factors: Tensor, source: str) -> None:
    """Llama 3.x's divisors, of which only `factor` varies."""
    _set(config, {"rope_type": "llama3", "factor": factors.max().item(), **_LLAMA3_ROPE})
    expected = _llama3_factors(config, rope_parameters(config))
    if expected.shape != factors.shape or not torch.allclose(expected, factors.float(), rtol=1e-4):
        raise InputError(f"{source} has rotary factors that are not Llama 3's: load the model's Hugging Face directory")


def _set_longrope(config: PretrainedConfig, tensors: Mapping[str, Tensor], said: float | None, source: str) -> None:
    pairs = rotary_dim(config) // 2
    for name in (LONG, SHORT):
        if name not in tensors or tensors[name].shape != (pairs,):
            raise InputError(f"{source} has no {name} of {pairs} rotary factors: export it again")
    original = config.to_dict().get("original_max_position_embeddings")
    if original is None:
        raise InputError(f"{source} has rotary factors that its architecture does not have: export it again")
    _set(config, {
        "rope_type": "longrope", "original_max_position_embeddings": original,
        "long_factor": tensors[LONG].tolist(), "short_factor": tensors[SHORT].tolist(),
    })  # fmt: skip
    if said is not None and not math.isclose(said, attention_factor(config), rel_tol=1e-5):
        _set(config, {"attention_factor": said})


def _llama3_factors(config: PretrainedConfig, rope: dict[str, Any]) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones stay, those between are interpolated (Llama 3.1 release)."""
    dim = head_dim(config)
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    wavelength = 2 * math.pi / frequency
    context = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return 1.0 / ((1 - smooth) / rope["factor"] + smooth)
