"""Write a fused model of the Llama family as GGUF in any type of gguf_types.py, tensor by tensor."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.atomic import atomic_file, refuse_existing
from entrenar.core.errors import InputError
from entrenar.exporting.fuse import fused_tensors
from entrenar.exporting.gguf_types import FILE_TYPES, FileType, Model, type_of
from entrenar.exporting.gguf_vocabulary import Vocabulary, vocabulary
from entrenar.files.lazy_tensor import LazyTensor, Packed
from entrenar.models import llama_gguf
from entrenar.ops.gguf_blocks import quantize_gguf
from entrenar.ops.linear_gguf import FLOAT_TYPES


def export_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, type: str = "f16") -> None:
    """Write a live model as `path`; see `write_gguf`."""
    write_gguf(fused_tensors(model), model.config, tokenizer, path, type)


def write_gguf(
    fused: list[LazyTensor], config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, path: Path, type: str
) -> None:
    """Write `path`, which must not exist, tensor by tensor; norms and biases stay float32.

    Args:
        fused: the model's tensors under their transformers names.
        type: one of gguf_types.py's, llama.cpp's mixtures; see there for what falls back to another.

    Raises:
        InputError: a model or tokenizer that this version does not write as GGUF.
    """
    refuse_existing(path)
    llama_gguf.check_exportable(config)
    tensors = [_renamed(tensor, config) for tensor in fused]
    factors = llama_gguf.rope_factors(config)
    if factors is not None:
        tensors.append(LazyTensor(llama_gguf.ROPE_FACTORS, tuple(factors.shape), lambda: factors))
    file_type, shape = FILE_TYPES[type], _choice(config, tensors)
    types = {tensor.name: type_of(tensor.name, tensor.shape, file_type, shape) for tensor in tensors}
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, llama_gguf.ARCHITECTURE)
        _add_model(writer, config, file_type)
        _add_vocabulary(writer, vocabulary(tokenizer, rows))
        _write(writer, tensors, types)


def _choice(config: PretrainedConfig, tensors: list[LazyTensor]) -> Model:
    text: Any = config
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    return Model(text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, tied)


def _renamed(tensor: LazyTensor, config: PretrainedConfig) -> LazyTensor:
    name = llama_gguf.gguf_name(tensor.name)
    if name is None:
        raise InputError(f"GGUF has no place for {tensor.name} in the {llama_gguf.ARCHITECTURE} architecture")

    def ordered(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: llama_gguf.to_gguf(tensor.name, make(), config)

    packed = tensor.packed and Packed(tensor.packed.type, ordered(tensor.packed.make))
    return LazyTensor(name, tensor.shape, ordered(tensor.make), packed)


def _add_model(writer: gguf.GGUFWriter, config: PretrainedConfig, file_type: FileType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(config.name_or_path or "model").stem)
    for key, value in llama_gguf.metadata_from_config(config).items():
        add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{llama_gguf.ARCHITECTURE}.{key}", value)
    writer.add_file_type(file_type.number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(writer: gguf.GGUFWriter, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    for name, index in words.special_ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_space_prefix(words.adds_space_prefix)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def _write(writer: gguf.GGUFWriter, tensors: list[LazyTensor], types: dict[str, str]) -> None:
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[types[tensor.name].upper()]
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_encode(tensor, types[tensor.name]).numpy())
    writer.close()


def _encode(tensor: LazyTensor, type: str) -> Tensor:
    """The tensor's bytes, (..., bytes a row) uint8; blocks that are of the type already are taken as they are."""
    if tensor.packed is not None and tensor.packed.type == type:
        return tensor.packed.make()
    values = tensor.make()
    if type in FLOAT_TYPES:
        return values.to(FLOAT_TYPES[type]).contiguous().view(torch.uint8)
    if not all(end.isfinite() for end in values.aminmax()):
        raise InputError(f"{tensor.name} holds a NaN or an infinity, which {type} cannot hold: check the model")
    return quantize_gguf(values, type)
