"""Small checkpoints with Llama's names, and configs over them."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.safetensors import write_checkpoint

HIDDEN, MIDDLE, VOCABULARY = 8, 12, 20


def shapes(layers: int, vocabulary: int = VOCABULARY, tied: bool = False) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(layers):
        before = f"model.layers.{layer}."
        found[f"{before}self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        found[f"{before}mlp.down_proj.weight"] = (HIDDEN, MIDDLE)
        found[f"{before}input_layernorm.weight"] = (HIDDEN,)
    found["model.norm.weight"] = (HIDDEN,)
    return found if tied else found | {"lm_head.weight": (vocabulary, HIDDEN)}


def tensors(seed: int, layers: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Tensor]:
    """Models of different seeds are near each other."""
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1000 + seed)
    return {
        name: (torch.randn(shape, generator=common) + 0.1 * torch.randn(shape, generator=own)).to(dtype)
        for name, shape in shapes(layers, **options).items()
    }


def write_model(directory: Path, values: Mapping[str, Tensor], tied: bool = False, shards: bool = False) -> str:
    """A model's directory; its path as a text."""
    directory.mkdir(parents=True)
    layers = len([name for name in values if name.endswith("q_proj.weight")])
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "vocab_size": values["model.embed_tokens.weight"].shape[0], "tie_word_embeddings": tied,
        "layer_types": [f"type-{layer}" for layer in range(layers)], "torch_dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards:
        lazy = [LazyTensor(name, tuple(x.shape), partial(lambda x: x, x)) for name, x in values.items()]
        write_checkpoint(directory, lazy, next(iter(values.values())).dtype, 2000)
    else:
        save_file(dict(values), directory / "model.safetensors")
    return str(directory)


def write_tokenizer(directory: str, tokens: list[str]) -> None:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (Path(directory) / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def write_config(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
