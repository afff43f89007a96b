"""Write a fused model of the Llama family as GGUF: f32, f16, bf16 or q8_0, tensor by tensor."""

from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.atomic import atomic_file, refuse_existing
from entrenar.core.errors import InputError
from entrenar.exporting.fuse import fused_tensors
from entrenar.exporting.gguf_vocabulary import Vocabulary, vocabulary
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.models import llama_gguf

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
_Q = gguf.GGMLQuantizationType
_FILE_TYPES = {
    "f32": (_Q.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (_Q.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (_Q.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Q.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def export_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, type: GGUFType = "f16") -> None:
    """Write `path`, which must not exist. Norms and biases stay float32; q8_0 falls back to f16 for odd row lengths.

    Raises:
        InputError: a model or tokenizer that this version does not write as GGUF.
    """
    refuse_existing(path)
    llama_gguf.check_exportable(model.config)
    tensors = [_renamed(tensor, model) for tensor in fused_tensors(model)]
    factors = llama_gguf.rope_factors(model.config)
    if factors is not None:
        tensors.append(LazyTensor(llama_gguf.ROPE_FACTORS, tuple(factors.shape), lambda: factors))
    weight_type, file_type = _FILE_TYPES[type]
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, llama_gguf.ARCHITECTURE)
        _add_model(writer, model, file_type)
        _add_vocabulary(writer, vocabulary(tokenizer, model.get_input_embeddings().num_embeddings))  # pyright: ignore
        _write(writer, tensors, weight_type)


def _renamed(tensor: LazyTensor, model: PreTrainedModel) -> LazyTensor:
    name = llama_gguf.gguf_name(tensor.name)
    if name is None:
        raise InputError(f"GGUF has no place for {tensor.name} in the {llama_gguf.ARCHITECTURE} architecture")
    return LazyTensor(name, tensor.shape, lambda: llama_gguf.to_gguf(tensor.name, tensor.make(), model.config))


def _add_model(writer: gguf.GGUFWriter, model: PreTrainedModel, file_type: gguf.LlamaFileType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(model.name_or_path or "model").stem)
    for key, value in llama_gguf.metadata_from_config(model.config).items():
        add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{llama_gguf.ARCHITECTURE}.{key}", value)
    writer.add_file_type(file_type)
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


def _write(writer: gguf.GGUFWriter, tensors: list[LazyTensor], weight_type: gguf.GGMLQuantizationType) -> None:
    types = {tensor.name: _type_of(tensor, weight_type) for tensor in tensors}
    for tensor in tensors:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, types[tensor.name])
        size = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw_dtype=types[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_encode(tensor.make(), types[tensor.name]))
    writer.close()


def _type_of(tensor: LazyTensor, weight_type: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return _Q.F32
    block, _ = gguf.GGML_QUANT_SIZES[weight_type]
    return _Q.F16 if tensor.shape[-1] % block else weight_type


def _encode(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The tensor's bytes, (..., bytes a row) uint8; float types rounded by PyTorch, q8_0 by the gguf package."""
    plain = {_Q.F32: torch.float32, _Q.F16: torch.float16, _Q.BF16: torch.bfloat16}
    if kind in plain:
        return tensor.to(plain[kind]).contiguous().view(torch.uint8).numpy()
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
