"""safetensors: read a checkpoint of one file or many shards, write one streaming, tensor by tensor.

Layout: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. The
library checks a header; the data are read by ourselves because the library maps them (docs/decisions/0009), and written
by ourselves because it wants a whole file's tensors in memory at once.
"""

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from entrenar.core.documents import open_regular, read_json
from entrenar.core.errors import InputError, listing
from entrenar.core.notices import say_once
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.stored_tensor import FileVersion, StoredTensor

SINGLE_NAME = "model.safetensors"
INDEX_NAME = f"{SINGLE_NAME}.index.json"
_MAX_NAME = 255  # bytes, of a file
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
Item = TypeVar("Item")
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Index:
    """What is read of an index: tensor → file."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it; `dtype` in safetensors' words, `start` from the beginning of the file."""

    file: FileVersion
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class SafetensorsCheckpoint:
    """The tensors of a directory (`model.safetensors`, or shards with an index) or of one file: `tensors`, by name; the
    free-form `metadata` of its files; and `notes`, what has been said on what of the directory is not read.

    Which files are read, and which of two tensors of one name, is as in transformers.

    Raises:
        InputError: no such file, a header that does not fit its file, or a tensor in two shards of which the index
            names another than transformers reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        files, index, self.notes = _checkpoint_files(path)
        for file in files:
            tensors, metadata = _read_header(file)
            self._refuse_twice(tensors, index)
            self.tensors |= tensors
            self.metadata |= metadata
        for note in self.notes:
            say_once(note)

    def _refuse_twice(self, tensors: dict[str, TensorInfo], index: Mapping[str, str]) -> None:
        """InputError if tensors of another shard have the same names, unless the index says that these are meant."""
        for name in tensors.keys() & self.tensors.keys():
            before, here = self.tensors[name].file.path.name, tensors[name].file.path.name
            if index.get(name) != here:
                raise InputError(
                    f"{self.path}: {name} is in both {before} and {here}, and which is meant is not known (the index "
                    f"says {index.get(name, 'nothing')}, transformers reads {here}): save the checkpoint again"
                )
            self.notes.append(f"{self.path}: {name} is in both {before} and {here}; {here} is read, as its index says")

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.tensors)

    def renamed(self, name_of: Callable[[str], str]) -> "SafetensorsCheckpoint":
        """The same tensors under other names; InputError if two of them get the same."""
        other = copy.copy(self)
        other.tensors = {name_of(name): info for name, info in self.tensors.items()}
        if len(other.tensors) != len(self.tensors):
            raise InputError(f"{self.path} has tensors both with and without a prefix in their names: save it again")
        return other

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies; InputError for a dtype that is not read."""
        info = self.tensors[name]
        if info.dtype not in _DTYPES:
            raise InputError(
                f"{info.file.path}: {name} is {info.dtype}, which is not read: save it in one of {', '.join(_DTYPES)}"
            )
        dtype = _DTYPES[info.dtype]
        return StoredTensor(info.file, info.start, info.size, info.shape, dtype, lambda raw: raw.view(dtype))

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        return self.stored(name).read()


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    with _reading(path), open_regular(path, "weights file") as file:
        version = FileVersion.of(path, file.fileno())
        with safe_open(path, framework="pt") as handle:  # checks dtypes, shapes and offsets against the file's size
            names = list(handle.keys())
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length).decode("utf-8"))
    return {name: _tensor_info(version, 8 + length, header[name]) for name in names}, header.get("__metadata__") or {}


def _tensor_info(file: FileVersion, data_start: int, entry: dict[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(file, entry["dtype"], tuple(entry["shape"]), data_start + begin, end - begin)


def read_metadata(file: Path) -> dict[str, str]:
    """The free-form metadata of one file."""
    with _reading(file), open_regular(file, "weights file"), safe_open(file, framework="pt") as handle:
        return handle.metadata() or {}


def _checkpoint_files(path: Path) -> tuple[list[Path], dict[str, str], list[str]]:
    """The files of a checkpoint, its index (tensor → file name) if it has one, and what is to be said of it."""
    if path.is_file():
        return [path], {}, []
    index, single = path / INDEX_NAME, path / SINGLE_NAME
    if _is_there(single):
        note = f"{path} has both {SINGLE_NAME} and {INDEX_NAME}: the first alone is read, as transformers does"
        return [single], {}, [note] if _is_there(index) and _names_others(index) else []
    if _is_there(index):
        weight_map = read_json(index, "shard index", _Index).weight_map
        return _indexed_files(index, weight_map), weight_map, []
    raise InputError(f"{path} holds no {SINGLE_NAME} and no {INDEX_NAME}: point to a model directory or a .gguf file")


def _other_weights(path: Path) -> str:
    """What a directory has in their place, in words."""
    others = sorted(
        file.name for end in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(end)
    )
    if not others:
        return ""
    why = "shards without an index" if others[0].startswith("model-0") else "which is not read"
    return f" (it has {listing(others, 2)}, {why})"


def _is_there(path: Path) -> bool:
    """Whether there is something of that name: what it is tells whoever opens it."""
    return os.path.lexists(path)


def _names_others(index: Path) -> bool:
    """Whether an index that is not read names shards; what an earlier save has left may also be broken."""
    try:
        return set(read_json(index, "shard index", _Index).weight_map.values()) != {SINGLE_NAME}
    except InputError:
        return True


def _indexed_files(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The shards an index names, which must lie beside it."""
    names = sorted(set(weight_map.values()))
    if not names:
        raise InputError(f"{index} names no files (weight_map: tensor → file): fetch it again")
    for name in names:
        if Path(name).name != name or name in ("", "..") or "\0" in name or len(os.fsencode(name)) > _MAX_NAME:
            raise InputError(f"{index} names {name[:60]!r}, which is not a plain file name beside it: refused")
        if not _is_there(index.parent / name):
            raise InputError(f"{index} names {name}, which is missing: the checkpoint is incomplete, fetch it again")
    return [index.parent / name for name in names]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a complete safetensors file ({error}): fetch or save it again") from None


@dataclass(frozen=True)
class Layout:
    """A file to be written: its first bytes, where the data of every tensor begins, and its size."""

    header: bytes
    starts: dict[str, int]
    size: int


def layout(
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """Where the tensors (name, shape, dtype) of one file go; equal ones give equal bytes (the library's own order is
    random)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts, offset = {}, 0
    for name, shape, dtype in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        starts[name], offset = offset, end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    first = len(encoded).to_bytes(8, "little") + encoded
    return Layout(first, {name: len(first) + start for name, start in starts.items()}, len(first) + offset)


def shard_names(count: int) -> list[str]:
    """What the files of a checkpoint are called."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(directory: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """The index of a checkpoint in shards: which file holds which tensor."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_checkpoint(
    directory: Path,
    tensors: Sequence[LazyTensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` (or one tensor) with their index.

    Args:
        tensors: made and written one at a time, converted to `dtype` (float32, float16 or bfloat16) or to their own.
        metadata: goes into the header of every file.
    """
    sizes = [tensor.bytes_as(dtype) for tensor in tensors]
    shards = split_shards(tensors, sizes, max_shard_bytes)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard, dtype, metadata)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_index(directory, weight_map, sum(sizes))


def split_shards(items: Sequence[Item], sizes: Sequence[int], limit: int) -> list[list[Item]]:
    """Items in order, in groups whose sizes add up to at most `limit`, or of one item."""
    shards: list[list[Item]] = [[]]
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if shards[-1] and total + size > limit:
            shards.append([])
            total = 0
        shards[-1].append(item)
        total += size
    return shards


def write_file(
    path: Path, tensors: Sequence[LazyTensor], dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, tensor by tensor."""
    with path.open("wb") as file:
        file.write(layout(((tensor.name, tensor.shape, tensor.dtype or dtype) for tensor in tensors), metadata).header)
        for tensor in tensors:
            data = tensor.make().to("cpu", tensor.dtype or dtype).contiguous()
            file.write(data.view(-1).view(torch.uint8).numpy().data)
