"""Where a model's config, tokenizer and weights come from: a Hugging Face directory or id, or a GGUF file."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.files.peft import whole_rows
from entrenar.files.prequantized import PrequantizedWeights, open_prequantized
from entrenar.files.stored_tensor import StoredTensor
from entrenar.gguf.config import check_layers, config_from_metadata
from entrenar.gguf.families import BIASES, Family, family_of, has_bias, has_stem
from entrenar.gguf.rope import ROPE_TENSORS, head_dim
from entrenar.gguf.special_tokens import special_tokens
from entrenar.gguf.split import GGUFModel
from entrenar.gguf.tokenizer import tokenizer_from_metadata
from entrenar.opening.directory import open_checkpoint, read_tokenizer, with_prefix


class Weights(Protocol):
    """Tensors by the names transformers gives them."""

    def names(self) -> Iterable[str]:
        """Every name the source holds."""
        ...

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies; nothing is read."""
        ...


@dataclass(frozen=True)
class ModelSource:
    """Everything needed to build a model; `path` is the directory or file.

    `provenance`: what entrenar noted in its files on how it was made (a merge's inputs, say), for whatever is made of
    it.
    """

    path: Path
    config: PretrainedConfig
    make_tokenizer: Callable[[], PreTrainedTokenizerBase]
    weights: Weights
    generation: GenerationConfig | None = None
    prequantized: PrequantizedWeights | None = None  # the same weights, for a checkpoint that comes quantized
    blocks: "GGUFWeights | None" = None  # the same weights as the file holds them, for a GGUF
    provenance: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, its chat template included."""
        with _reading(self.path):
            return self.make_tokenizer()


def open_source(path: str, *, with_tokenizer: bool = True) -> ModelSource:
    """Open a model without reading its weights.

    Args:
        with_tokenizer: make the tokenizer now, which takes most of the time, and know that it is whole.

    Raises:
        InputError: nothing there, an architecture that is not known, or a broken file.
    """
    source = _open_gguf(Path(path)) if path.endswith(".gguf") else _open_directory(path)
    if with_tokenizer:
        _ = source.tokenizer
    return source


def with_tokenizer_of(source: ModelSource, directory: Path, largest: int) -> ModelSource:
    """The source with the tokenizer that lies beside an adapter with rows for tokens up to `largest` (−1: with none).

    An embedding in the adapter's file that is larger than the model's has rows for new tokens too.

    Raises:
        InputError: no tokenizer lies there, and the source's own does not have those tokens.
    """
    rows = whole_rows(directory)
    if rows > source.config.get_text_config().vocab_size:
        largest = max(largest, rows - 1)
    if largest < 0:
        return source
    if (directory / "tokenizer_config.json").is_file():
        return replace(source, make_tokenizer=partial(read_tokenizer, directory))
    if largest >= len(source.tokenizer):
        raise InputError(
            f"{directory} has a row for token {largest}, but the model has {len(source.tokenizer)} tokens and no "
            "tokenizer lies beside the adapter: save the one it was trained with there"
        )
    return source


def _open_directory(path: str) -> ModelSource:
    directory = local_directory(path)
    checkpoint = open_checkpoint(directory)
    with _reading(directory):
        # False, not unset: unset, transformers asks on the terminal whether to run the directory's own code.
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        has_generation = (directory / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(directory) if has_generation else None
    make_tokenizer = partial(read_tokenizer, directory)
    made = _provenance(checkpoint.metadata)
    checkpoint = with_prefix(checkpoint, config)
    weights = open_prequantized(checkpoint)
    if weights is not None and hasattr(config, "quantization_config"):  # what transformers would load them with
        delattr(config, "quantization_config")
    return ModelSource(directory, config, make_tokenizer, weights or checkpoint, generation, weights, provenance=made)


def _provenance(metadata: Mapping[str, object]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.startswith("entrenar.") and isinstance(value, str)}


def local_directory(path: str) -> Path:
    """A model's directory: `path` itself, or the snapshot of that hub id; InputError if it is neither."""
    return Path(path) if Path(path).is_dir() else _download(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever transformers and tokenizers raise over a model's files is about those files."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is not a model that transformers {_version()} knows: {_first(error)}") from None


def _open_gguf(path: Path) -> ModelSource:
    file = GGUFModel(path)
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{path} has no token_embd.weight: it is not a language model")
    rows, tied = file.tensors["token_embd.weight"].shape[0], "output.weight" not in file.tensors
    check_layers(file.metadata, file.tensors, str(path))
    rope = {name: file.stored(name).read() for name in ROPE_TENSORS if name in file.tensors}
    with _reading(path):
        config = config_from_metadata(file.metadata, str(path), rows, tied, rope)
    for switch, stems in BIASES.items():
        if hasattr(config, switch):
            setattr(config, switch, any(has_stem(name, stems, "bias") for name in file.tensors))
    config._name_or_path = str(path)
    weights = GGUFWeights(file, config, family_of(config))
    make_tokenizer = partial(_gguf_tokenizer, file.metadata, rows, str(path))
    made = _provenance(file.metadata)
    generation = _gguf_generation(file.metadata, config, str(path))
    return ModelSource(path, config, make_tokenizer, weights, generation, blocks=weights, provenance=made)


def _gguf_tokenizer(metadata: dict[str, Any], rows: int, source: str) -> PreTrainedTokenizerBase:
    tokenizer = tokenizer_from_metadata(metadata, source)
    if len(metadata["tokenizer.ggml.tokens"]) != rows:
        raise InputError(
            f"{source} has {len(metadata['tokenizer.ggml.tokens'])} tokens but {rows} embeddings: fetch it again"
        )
    return tokenizer


def _gguf_generation(metadata: dict[str, Any], config: PretrainedConfig, source: str) -> GenerationConfig | None:
    """What llama.cpp stops at, as the generation config of a directory says it."""
    if not metadata.get("tokenizer.ggml.tokens"):
        return None  # making the tokenizer says so
    known: Any = config
    return GenerationConfig(
        bos_token_id=known.bos_token_id, eos_token_id=special_tokens(metadata, source).ends,
        pad_token_id=known.pad_token_id,
    )  # fmt: skip


class GGUFWeights:
    """The tensors of a GGUF under transformers' names, and with the values and in the row order they have there."""

    def __init__(self, file: GGUFModel, config: PretrainedConfig, family: Family) -> None:
        self._file = file
        self._config = config
        self._family = family
        # A tensor the family does not have keeps its own name, and so is reported as unexpected.
        weights = [name for name in file.tensors if name not in ROPE_TENSORS]
        self._names = {family.hf_name(name) or name: name for name in weights}
        self._zeros = _absent_biases(config, family, file)

    def names(self) -> Iterable[str]:
        """Every tensor, by its transformers name."""
        return self._names | self._zeros

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies; decoded it is dequantized and as transformers has it."""
        if name in self._zeros:
            return self._zeros[name]
        found = self._in_our_order(name, self._file.stored(self._names[name]))
        offset = self._family.offset(name)
        if not offset:
            return found
        # In float32: of a norm that is stored in 16 bits, 1 taken off in those would cost what lies beside the 1.
        return replace(found, dtype=torch.float32, decode=lambda raw: found.decode(raw).float() - offset)

    def packed(self, name: str) -> StoredTensor:
        """The same tensor's bytes as they stand, in transformers' row order: (..., bytes of a row) uint8."""
        return self._in_our_order(name, self._file.packed(self._names[name]))

    @property
    def raw_metadata(self) -> dict[str, bytes]:
        """The file's keys as they stand in it."""
        return self._file.raw_metadata

    def type_of(self, name: str) -> str:
        """The type those bytes are of: `q4_k`, `f16`, …"""
        return self._file.tensors[self._names[name]].type.name.lower()

    def _in_our_order(self, name: str, found: StoredTensor) -> StoredTensor:
        """Rows of q and k reordered: whole rows, so that it does not matter what they are held as."""
        if not self._family.reorders(name):
            return found
        columns = found.shape[1:]

        def decode(raw: Tensor) -> Tensor:
            return self._family.in_our_order(found.decode(raw).view(-1, *columns), self._config).view(-1)

        return replace(found, decode=decode, group=head_dim(self._config) * math.prod(columns))


def _absent_biases(config: PretrainedConfig, family: Family, file: GGUFModel) -> dict[str, StoredTensor]:
    """Zeros for the biases that a transformers class has and a file has not: llama.cpp adds each where there is one."""
    zeros: dict[str, StoredTensor] = {}
    for name in list(file.tensors):
        bias = f"{name.removesuffix('weight')}bias"
        hf_name = family.hf_name(bias) if name.endswith(".weight") else None
        if bias in file.tensors or hf_name is None or not has_bias(config, bias):
            continue
        rows = file.tensors[name].shape[0]
        stored = file.stored(name)
        zeros[hf_name] = replace(
            stored, size=0, shape=(rows,), dtype=torch.float32, decode=partial(_zeros, rows), group=1
        )
    return zeros


def _zeros(count: int, raw: Tensor) -> Tensor:
    del raw
    return torch.zeros(count)


def _download(model_id: str) -> Path:
    """The local snapshot of a hub id; whatever stops it, the user hears one sentence."""
    from huggingface_hub import snapshot_download

    if "@" in model_id:
        raise InputError(
            f"model {model_id!r}: revisions (@…) are not read: download that revision and point to its directory"
        )
    if model_id.count("/") > 1 or model_id.startswith((".", "/", "~")):
        raise InputError(
            f"model path {model_id!r} does not exist: point to a model directory, a .gguf file or a hub id"
        )
    try:
        return Path(snapshot_download(model_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except Exception as error:
        raise InputError(
            f"model {model_id!r} is not a directory, a .gguf file or a hub model within reach: {_first(error)}"
        ) from None


def _first(error: Exception) -> str:
    head, _, rest = str(error).strip().partition("\n")
    return f"{head} {rest.strip().partition(chr(10))[0]}" if head.endswith(":") else head


def _version() -> str:
    import transformers

    return transformers.__version__
