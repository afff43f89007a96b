"""Write a fused model of a family of gguf/families.py as GGUF, in any type of gguf/types.py, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import gguf
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from entrenar.core.atomic import atomic_file, refuse_existing
from entrenar.core.errors import InputError, listing
from entrenar.files.lazy_tensor import GGUFBlocks, LazyTensor, as_float
from entrenar.gguf.config import check_exportable, metadata_from_config
from entrenar.gguf.families import Family, family_of
from entrenar.gguf.rope import rope_tensors
from entrenar.gguf.types import FILE_TYPES, Model, type_of
from entrenar.gguf.vocabulary import vocabulary
from entrenar.gguf.vocabulary_probe import Say, check_same_ids
from entrenar.gguf.writer import GGUFTensor, Value, write_gguf_file
from entrenar.ops.gguf.blocks import IMPORTANCE_TYPES, quantize_gguf
from entrenar.ops.linear.gguf import FLOAT_TYPES

Metadata = dict[str, Value | bytes]
_HEAD, _TEMPLATE = "lm_head.weight", "tokenizer.chat_template"


def _ignored(_: str) -> None:
    """Takes what nobody asked to hear."""


# What keys begin with that are about a file, and not about the model in it.
_OF_ONE_FILE = ("general.file_type", "general.quantization_version", "general.alignment", "split.", "quantize.imatrix.")


def metadata(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = (), say: Say = _ignored
) -> Metadata:
    """The keys of a GGUF for a model and its tokenizer; see `vocabulary_metadata`."""
    check_exportable(config)
    return _model_keys(config) | vocabulary_metadata(tokenizer, cast(Any, config).vocab_size, ends, say)


def copied_metadata(raw: Mapping[str, bytes]) -> Metadata:
    """The keys of a GGUF that is made of another one, which has the entries `raw`."""
    return {key: entry for key, entry in raw.items() if not key.startswith(_OF_ONE_FILE)}


def write_gguf(
    fused: list[LazyTensor],
    config: PretrainedConfig,
    keys: Metadata,
    path: Path,
    type: str,
    importance: Mapping[str, Tensor] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `path`, which must not exist, tensor by tensor; norms and biases stay float32.

    Args:
        fused: the model's tensors under their transformers names. keys: see above.
        type: one of gguf/types.py's, llama.cpp's mixtures; see there for what falls back to another.
        importance: transformers' name of a weight → (columns,) float32, how much an error in each column counts; K
            types use it.
        check: called with the finished file before it gets its name; what it raises leaves nothing behind.

    Raises:
        InputError: a model that this version does not write as GGUF, or a number that the type does not hold.
    """
    refuse_existing(path)
    check_exportable(config)
    family = family_of(config)
    tensors = [_renamed(tensor, config, family) for tensor in fused]
    for name, factors in rope_tensors(config).items():
        tensors.append(LazyTensor(name, tuple(factors.shape), partial(torch.clone, factors)))
    file_type, shape = FILE_TYPES[type], _choice(config, tensors)
    weights = _of_columns(importance or {}, family, shape.tied)
    typed = [(tensor, type_of(tensor.name, tensor.shape, file_type, shape)) for tensor in tensors]
    general = {"general.file_type": int(file_type.number), "general.quantization_version": gguf.GGML_QUANT_VERSION}
    with atomic_file(path) as temporary:
        write_gguf_file(
            temporary,
            {**keys, **general},
            [
                GGUFTensor(tensor.name, tensor.shape, kind, partial(_encode, tensor, kind, weights.get(tensor.name)))
                for tensor, kind in typed
            ],
        )
        if check is not None:
            check(temporary)


def _of_columns(importance: Mapping[str, Tensor], family: Family, tied: bool) -> dict[str, Tensor]:
    """By the name in the file; a tied embedding counts as the head that it is."""
    named = {str(family.gguf_name(name)): columns for name, columns in importance.items() if name != _HEAD}
    if _HEAD in importance:
        named["token_embd.weight" if tied else "output.weight"] = importance[_HEAD]
    return named


def _choice(config: PretrainedConfig, tensors: list[LazyTensor]) -> Model:
    text: Any = config
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    return Model(text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads, tied)


def _renamed(tensor: LazyTensor, config: PretrainedConfig, family: Family) -> LazyTensor:
    name = family.gguf_name(tensor.name)
    if name is None:
        raise InputError(f"GGUF has no place for {tensor.name} in the {family.architecture} architecture")

    def ordered(make: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: family.to_gguf(tensor.name, make(), config)

    blocks = tensor.blocks and GGUFBlocks(tensor.blocks.type, ordered(tensor.blocks.make))
    return LazyTensor(name, tensor.shape, ordered(tensor.make), blocks=blocks)


def _model_keys(config: PretrainedConfig) -> Metadata:
    return {
        "general.architecture": family_of(config).architecture,
        "general.type": gguf.GGUFType.MODEL,
        "general.name": Path(config.name_or_path or "model").stem,
        **metadata_from_config(config),
    }


def vocabulary_metadata(
    tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int] = (), say: Say = _ignored
) -> Metadata:
    """The keys of a tokenizer for a model with `rows` embeddings, which llama.cpp makes the same tokens by.

    Args:
        ends: see `vocabulary`. say: gets a sentence for what differs in rare texts, or is not there.

    Raises:
        InputError: as `vocabulary` and `check_same_ids`.
    """
    words = vocabulary(tokenizer, rows, ends)
    keys: dict[str, Value | None] = {
        "model": words.model, "pre": words.pre, "tokens": words.tokens, "token_type": words.types,
        "merges": words.merges, "scores": words.scores, "add_bos_token": words.adds_bos,
        "add_eos_token": words.adds_eos or None, "add_space_prefix": words.adds_space_prefix,
        **{f"{name}_token_id": index for name, index in words.special_ids.items()},
    }  # fmt: skip
    written: Metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    written |= _template_keys(words.chat_templates)
    check_same_ids(tokenizer, written, say)
    if words.unmarked_ends:
        say(f"a GGUF has keys for three ends of an answer; {listing(words.unmarked_ends)} must be known by its text")
    return written


def _template_keys(templates: Mapping[str, str]) -> Metadata:
    """As gguf-py's `add_chat_template` writes them."""
    others = {name: template for name, template in templates.items() if name != "default"}
    keys: Metadata = {f"{_TEMPLATE}.{name}": template for name, template in others.items()}
    if others:
        keys[f"{_TEMPLATE}s"] = list(others)
    return keys | ({_TEMPLATE: templates["default"]} if "default" in templates else {})


def _encode(tensor: LazyTensor, type: str, importance: Tensor | None) -> Tensor:
    """The tensor's bytes, (..., bytes a row) uint8; blocks that are of the type already are taken as they are."""
    if tensor.blocks is not None and tensor.blocks.type == type:
        return tensor.blocks.make()
    values = tensor.make()
    if type in FLOAT_TYPES:
        return as_float(tensor.name, values, FLOAT_TYPES[type]).contiguous().view(torch.uint8)
    if not all(end.isfinite() for end in values.aminmax()):
        raise InputError(f"{tensor.name} holds a NaN or an infinity, which {type} cannot hold: check the model")
    return quantize_gguf(values, type, importance if type in IMPORTANCE_TYPES else None)
