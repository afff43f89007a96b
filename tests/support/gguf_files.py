"""The tiny model as a GGUF, written with the gguf package alone as llama.cpp's converter writes it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

Arrays = dict[str, np.ndarray]


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q and k in llama.cpp's order: `LlamaModel.permute` of convert_hf_to_gguf.py."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _arrays(model: PreTrainedModel) -> Arrays:
    config: Any = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    arrays: Arrays = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().numpy()
        for part, count in heads.items():
            weight = _permute(weight, count) if f".{part}." in name else weight
        arrays[str(names.get_name(name, try_suffixes=(".weight", ".bias")))] = weight
    return arrays


def _add_config(writer: GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    writer.add_unk_token_id(vocabulary["<|endoftext|>"])
    writer.add_bos_token_id(vocabulary["<|im_start|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|im_end|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(str(tokenizer.chat_template))


def _merges(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def _add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: str) -> None:
    """As the converter: vectors stay float32."""
    chosen = GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
    writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)


@pytest.fixture
def make_gguf(tmp_path: Path, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Write a Llama as tmp_path/model.gguf.

    `kind`: the type of its matrices; `source`: a Hugging Face directory; `change`: edits the tensors before they are
    written; `adjust`: edits the metadata, key → GGUFValue.
    """

    def make(
        kind: str = "F32",
        source: Path = tiny_model_dir,
        change: Callable[[Arrays], object] = lambda arrays: None,
        adjust: Callable[[dict[str, Any]], object] = lambda metadata: None,
    ) -> Path:
        model = AutoModelForCausalLM.from_pretrained(source)
        arrays = _arrays(model)
        change(arrays)
        writer = GGUFWriter(tmp_path / "model.gguf", "llama")
        _add_config(writer, model.config)
        _add_tokenizer(writer, tiny_tokenizer)
        adjust(writer.kv_data[0])
        for name, values in arrays.items():
            _add_tensor(writer, name, values, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "model.gguf"

    return make
