"""Where a model's config, tokenizer and weights come from: a Hugging Face directory or id, or a GGUF file."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.files.peft import whole_rows
from entrenar.files.prequantized import PrequantizedWeights, open_prequantized
from entrenar.files.stored_tensor import StoredTensor
from entrenar.gguf.config import check_layers, config_from_metadata
from entrenar.gguf.families import BIASES, family_of, has_stem
from entrenar.gguf.rope import ROPE_TENSORS
from entrenar.gguf.special_tokens import generation_config
from entrenar.gguf.split import GGUFModel
from entrenar.gguf.tokenizer import tokenizer_for_rows
from entrenar.gguf.weights import GGUFWeights
from entrenar.opening.directory import open_checkpoint, read_tokenizer, with_prefix
from entrenar.opening.hub import local_directory
from entrenar.opening.reading import reading


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
    prequantized: PrequantizedWeights | None = None  # `weights`, of a checkpoint that comes quantized
    gguf: GGUFWeights | None = None  # `weights`, of a GGUF
    provenance: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, its chat template included."""
        with reading(self.path):
            return self.make_tokenizer()

    @property
    def ends(self) -> list[int]:
        """The tokens that generation stops at by the model's files: its generation config, else its config."""
        stated = getattr(self.generation or self.config.get_text_config(), "eos_token_id", None)
        return stated if isinstance(stated, list) else [stated] if stated is not None else []


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
    with reading(directory):
        # False, not unset: unset, transformers asks on the terminal whether to run the directory's own code.
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        has_generation = (directory / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(directory) if has_generation else None
    make_tokenizer = partial(read_tokenizer, directory)
    provenance = _provenance(checkpoint.metadata)
    checkpoint = with_prefix(checkpoint, config)
    prequantized = open_prequantized(checkpoint)
    if prequantized is not None and hasattr(config, "quantization_config"):  # what transformers would load them with
        delattr(config, "quantization_config")
    return ModelSource(
        directory, config, make_tokenizer, prequantized or checkpoint, generation, prequantized, provenance=provenance
    )


def _provenance(metadata: Mapping[str, object]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.startswith("entrenar.") and isinstance(value, str)}


def _open_gguf(path: Path) -> ModelSource:
    file = GGUFModel(path)
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{path} has no token_embd.weight: it is not a language model")
    rows, tied = file.tensors["token_embd.weight"].shape[0], "output.weight" not in file.tensors
    check_layers(file.metadata, file.tensors, str(path))
    rope = {name: file.stored(name).read() for name in ROPE_TENSORS if name in file.tensors}
    with reading(path):
        config = config_from_metadata(file.metadata, str(path), rows, tied, rope)
    for switch, stems in BIASES.items():
        if hasattr(config, switch):
            setattr(config, switch, any(has_stem(name, stems, "bias") for name in file.tensors))
    config._name_or_path = str(path)
    weights = GGUFWeights(file, config, family_of(config))
    make_tokenizer = partial(tokenizer_for_rows, file.metadata, rows, str(path))
    generation = generation_config(file.metadata, config, str(path))
    provenance = _provenance(file.metadata)
    return ModelSource(path, config, make_tokenizer, weights, generation, gguf=weights, provenance=provenance)
