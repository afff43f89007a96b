"""A live model as files: what tests give to other tools."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.atomic import atomic_directory
from entrenar.exporting.fuse import fused_tensors
from entrenar.exporting.gguf import metadata, write_gguf
from entrenar.exporting.safetensors_output import MAX_SHARD_BYTES
from entrenar.files.safetensors import write_checkpoint


def export_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, type: str = "f16") -> None:
    """Write a live model as `path`; see `write_gguf`."""
    write_gguf(fused_tensors(model), model.config, metadata(model.config, tokenizer), path, type)


def export_huggingface(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `directory`, which must not exist; tensors are fused and written one at a time.

    Args:
        dtype: float32, float16 or bfloat16.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with atomic_directory(directory) as temporary:
        write_checkpoint(temporary, fused_tensors(model), dtype, max_shard_bytes)
        config.save_pretrained(temporary)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
