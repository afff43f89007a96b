"""safetensors: read a checkpoint of one file or many shards, write one streaming, tensor by tensor.

Layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. The
library reads and checks; writing is ours because the library wants a whole file's tensors in memory at once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.files.lazy_tensor import LazyTensor

INDEX_NAME = "model.safetensors.index.json"
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class SafetensorsCheckpoint:
    """The tensors of a directory (`model.safetensors`, or shards with an index) or of one file, read one at a time."""

    def __init__(self, path: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in _checkpoint_files(path):
            with _reading(file), safe_open(file, framework="pt") as handle:
                self._files |= dict.fromkeys(handle.keys(), file)

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor; its pages stay the file's own until they are used."""
        with _reading(self._files[name]), safe_open(self._files[name], framework="pt") as handle:
            return handle.get_tensor(name)


def read_metadata(file: Path) -> dict[str, str]:
    """The free-form metadata of one file."""
    with _reading(file), safe_open(file, framework="pt") as handle:
        return handle.metadata() or {}


def _checkpoint_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index, single = path / INDEX_NAME, path / "model.safetensors"
    if index.is_file():
        return _indexed_files(index)
    if single.is_file():
        return [single]
    raise InputError(
        f"{path} holds no model.safetensors and no {INDEX_NAME}: point to a model directory or a .gguf file"
    )


def _indexed_files(index: Path) -> list[Path]:
    """The shards an index names, which must lie beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index} is not a shard index (weight_map: tensor → file): {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which is not a plain file name beside it: refused")
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names {name}, which is missing: the checkpoint is incomplete, fetch it again")
    return [index.parent / name for name in names]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}): fetch or save it again") from None


def write_checkpoint(directory: Path, tensors: Sequence[LazyTensor], dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` (or one tensor) with their index.

    Args:
        tensors: made and written one at a time, converted to `dtype` (float32, float16 or bfloat16).
    """
    shards = _shards(tensors, max_shard_bytes // dtype.itemsize)
    if len(shards) == 1:
        write_file(directory / "model.safetensors", shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, dtype)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.numel for tensor in tensors) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(tensors: Sequence[LazyTensor], max_elements: int) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.numel > max_elements:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.numel
    return shards


def write_file(
    path: Path, tensors: Sequence[LazyTensor], dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, tensor by tensor; equal tensors give equal bytes (the library's metadata order is random)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.numel * dtype.itemsize
        header[tensor.name] = {
            "dtype": _DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            data = tensor.make().to(dtype).contiguous()
            file.write(data.view(-1).view(torch.uint8).numpy().data)
