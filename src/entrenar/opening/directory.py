"""A Hugging Face directory before transformers opens it: only regular files, and a config that its weights can be of.

transformers opens whatever lies under a file's name (it would wait for ever at a named pipe) and builds whatever a
config asks for. So both are looked at first.
"""

import os
import stat
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from entrenar.core.documents import LIMIT, read_json
from entrenar.core.errors import InputError
from entrenar.files.foreign import refuse_foreign
from entrenar.files.prequantized import weight_of
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.opening.plausible import check_sizes

CONFIG_NAME = "config.json"
_READ_WHOLE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# Of every kind of tokenizer that transformers reads, the file it cannot do without.
_TOKENIZERS = ("tokenizer.json", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json", "*bpe*", "*.vocab")
_SENTENCEPIECE = "tokenizer.model"


def check_files(directory: Path) -> None:
    """InputError if something in a directory is neither a file nor a directory, or is too large to be read whole."""
    try:
        with os.scandir(directory) as entries:
            files = sorted((entry.name, entry.stat()) for entry in entries if Path(entry.path).exists())
    except OSError as error:
        raise InputError(f"{directory} cannot be read: {error.strerror}") from None
    for name, status in files:
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise InputError(f"{directory / name} is no file but a pipe, a device or a socket: take it away")
        if name.endswith(_READ_WHOLE) and status.st_size > LIMIT:
            raise InputError(f"{directory / name} is larger than {LIMIT:,} bytes, which no such file is: check it")


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory.

    Raises:
        InputError: there is none, or one that transformers reads with other packages alone. Whatever else transformers
            and tokenizers raise is not caught.
    """
    check_files(directory)
    names = {path.name for pattern in _TOKENIZERS for path in directory.glob(pattern)}
    if not names:
        raise InputError(
            f"{directory} has no tokenizer (tokenizer.json): copy the tokenizer's files of the model it was made of "
            "there"
        )
    missing = [name for name in ("sentencepiece", "google.protobuf") if _is_missing(name)]
    if missing and _SENTENCEPIECE in names and "tokenizer.json" not in names:
        raise InputError(
            f"{directory} has its tokenizer as {_SENTENCEPIECE} alone (SentencePiece), which transformers reads with "
            "the packages sentencepiece and protobuf: install both, or put a tokenizer.json beside it (transformers: "
            "AutoTokenizer.from_pretrained, then save_pretrained)"
        )
    # False, not unset: unset, transformers asks on the terminal whether to run the directory's own code.
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _is_missing(package: str) -> bool:
    try:
        return find_spec(package) is None
    except ModuleNotFoundError:  # of google.protobuf, if there is no google
        return True


def open_checkpoint(directory: Path) -> SafetensorsCheckpoint:
    """The weights of a directory whose config can be theirs, and which are not quantized in a way that is not read.

    Raises:
        InputError: they are, the config's sizes lie, or a file of the directory is none.
    """
    check_files(directory)
    path = directory / CONFIG_NAME
    if not path.exists():
        raise InputError(f"{directory} has no {CONFIG_NAME}: point to a model's directory")
    content: dict[str, Any] = read_json(path, "model config")
    checkpoint = SafetensorsCheckpoint(directory)
    refuse_foreign(directory, content, checkpoint.tensors)
    check_sizes(str(path), content, len(checkpoint.tensors))
    return checkpoint


def with_prefix(checkpoint: SafetensorsCheckpoint, config: PretrainedConfig) -> SafetensorsCheckpoint:
    """The tensors under the names of the whole model where they are those of its bare decoder, as transformers does.

    GPT-2 lies so on the hub, and whatever AutoModel has saved: `layers.0…` where the language model has
    `model.layers.0…`, but `lm_head` as it is.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    prefix = getattr(kind, "base_model_prefix", "")
    if not prefix or any(name.startswith(f"{prefix}.") for name in checkpoint.names()):
        return checkpoint
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # whoever builds it says why
        return checkpoint
    state = model.state_dict().keys()
    return checkpoint.renamed(lambda name: f"{prefix}.{name}" if f"{prefix}.{weight_of(name)}" in state else name)
