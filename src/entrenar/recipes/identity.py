"""What a base is, told by its content: a run goes on only over the weights it began with."""

import hashlib
import json
from pathlib import Path
from typing import Protocol

from entrenar.core.documents import read_json
from entrenar.files.stored_tensor import StoredTensor
from entrenar.opening.source import ModelSource

_STRETCHES, _BYTES = 16, 4096  # of each tensor: some MB of a 7B model, so it costs no time
# What transformers writes anew with every save, whatever the model.
_PASSING = {"transformers_version", "_name_or_path"}


class _Checkpoint(Protocol):
    def stored(self, name: str) -> StoredTensor: ...


def base_identity(source: ModelSource) -> str:
    """SHA-256 over a base's config and, of each of its tensors, name, shape, dtype and bytes.

    Of a tensor of more than 64 KB, 16 stretches of 4 KB are read, evenly spaced: any training, merge or quantization
    changes them; a single number changed between them is not seen.
    """
    hasher = hashlib.sha256(_config_text(source).encode())
    for name, tensor in _tensors(source):
        hasher.update(f"|{name}|{tensor.shape}|{tensor.size}|".encode())
        _add_sample(hasher, tensor)
    return hasher.hexdigest()


def _tensors(source: ModelSource) -> list[tuple[str, StoredTensor]]:
    """Every tensor as its bytes stand in the file."""
    if source.gguf is not None:
        return [(name, source.gguf.blocks(name)) for name in sorted(source.gguf.names())]
    packed = source.prequantized
    if packed is not None:
        return [(name, packed.checkpoint.stored(name)) for name in sorted(packed.checkpoint.names())]
    return [(name, source.weights.stored(name)) for name in sorted(source.weights.names())]


def _add_sample(hasher: "hashlib._Hash", tensor: StoredTensor) -> None:
    if tensor.size <= _STRETCHES * _BYTES:
        hasher.update(tensor.first_bytes(tensor.size))
        return
    last = tensor.size - _BYTES
    for number in range(_STRETCHES):
        hasher.update(tensor.bytes_at(last * number // (_STRETCHES - 1), _BYTES))


def _config_text(source: ModelSource) -> str:
    if source.gguf is not None:
        keys = {k: v.hex() for k, v in source.gguf.raw_metadata.items() if not k.startswith(("tokenizer.", "general."))}
        return json.dumps(keys, sort_keys=True)
    values = read_json(Path(source.path) / "config.json", "model config")
    return json.dumps({key: value for key, value in values.items() if key not in _PASSING}, sort_keys=True)
