"""GGUF v2/v3 reader: strict and lazy. (gguf/writer.py writes.)

The package's own GGUFReader takes seconds for a vocabulary of 49k tokens and believes what the header says; this one
takes a fraction of a second and checks every count, length and offset against the file's size before it uses it.
Layout: magic, version, tensor count, key count; keys (string, type, value); tensor infos (string, dimensions, type,
offset); padding to the alignment; data: the tensors in the order of their infos, each padded to the alignment. A type,
shape or offset that lies is thus seen, because the next tensor is not where it must be; llama.cpp checks the same.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from entrenar.core.documents import open_regular, reason
from entrenar.core.errors import InputError
from entrenar.files.stored_tensor import ALIGNMENT, FileVersion, StoredTensor
from entrenar.ops.gguf.blocks import DEQUANTIZED_TYPES, dequantize_gguf

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
# A header becomes Python objects of ten times its size. The largest published ones hold 2 million strings in 40 MB.
_MAX_ENTRIES, _MAX_STRING = 1 << 24, 1 << 26
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; `shape` in PyTorch's order, `start` from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    start: int
    size: int


class GGUFFile:
    """An open GGUF file: `metadata` (key → value), `tensors` (name → TensorInfo), `read(name)`.

    Raises:
        InputError: not a GGUF, truncated, or a header that does not fit the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        cursor = _Cursor(path)
        version, tensor_count, key_count = _read_start(cursor)
        self.version = version
        self.metadata: dict[str, Any] = {}
        self.raw_metadata: dict[str, bytes] = {}  # each key's whole entry as it stands: name, type, value
        for _ in range(cursor.checked_count(key_count, 13)):
            start, key = cursor.offset, cursor.string(strict=False)
            if key in self.metadata:
                raise cursor.error(f"key {key!r} appears twice")
            # A model depends on its tokens; a description that is not UTF-8 harms nobody.
            self.metadata[key] = cursor.value(cursor.number("I"), strict=key.startswith("tokenizer."))
            self.raw_metadata[key] = cursor.map[start : cursor.offset]
        raw = [_read_info(cursor) for _ in range(cursor.checked_count(tensor_count, 24))]
        self.tensors = _place(cursor, raw, self.metadata.get("general.alignment", 32))
        self._version = cursor.close()

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies: float types as they are, quantized ones to be decoded to float32."""
        info = self.tensors[name]
        dtype = _PLAIN.get(info.type.name, torch.float32)
        return StoredTensor(self._version, info.start, info.size, info.shape, dtype, partial(_decode, info, self.path))

    def blocks(self, name: str) -> StoredTensor:
        """The same tensor's bytes as they stand, (..., bytes of a row) uint8."""
        info = self.tensors[name]
        shape = (*info.shape[:-1], info.size // math.prod(info.shape[:-1]))
        return StoredTensor(self._version, info.start, info.size, shape, torch.uint8, lambda raw: raw)

    def read(self, name: str) -> Tensor:
        """One tensor in PyTorch's shape, in memory of its own."""
        return self.stored(name).read()


def is_decoded(kind: str) -> bool:
    """Whether tensors of this type (`iq4_xs`, …) are read as numbers."""
    known = gguf.GGMLQuantizationType.__members__.get(kind.upper())
    return known is not None and (
        known.name in _PLAIN or kind in DEQUANTIZED_TYPES or known in gguf.quants._type_traits
    )


def _decode(info: TensorInfo, path: Path, raw: Tensor) -> Tensor:
    """Bytes of whole blocks → their values, flat."""
    kind = info.type.name
    if kind in _PLAIN:
        return raw.view(_PLAIN[kind])
    block, block_bytes = gguf.GGML_QUANT_SIZES[info.type]
    if kind.lower() in DEQUANTIZED_TYPES:
        blocks = math.gcd(raw.numel() // block_bytes, ALIGNMENT)  # of a row, as the kernel wants its work cut
        return dequantize_gguf(raw.view(-1, blocks * block_bytes), kind.lower(), blocks * block).view(-1)
    try:
        return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), info.type))
    except NotImplementedError:
        raise InputError(f"{path}: tensor {info.name!r} is {kind}, which is not read as weights") from None


class _Cursor:
    """Reads numbers and strings one after another; every read is checked against the end of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.entries = 0  # keys, tensors and elements of arrays so far
        with open_regular(path, "GGUF file") as file:
            try:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: it is empty
                raise InputError(f"GGUF file {path} cannot be read: {reason(error)}") from None
            self._version = FileVersion.of(path, file.fileno())
        self.size = len(self.map)

    def close(self) -> FileVersion:
        """Let the mapping go; say which file it was."""
        self.map.close()
        return self._version

    def error(self, what: str) -> InputError:
        return InputError(f"{self.path} is not a valid GGUF file: {what}; download or export it again")

    def take(self, size: int) -> int:
        """Move past `size` bytes; return where they start."""
        start = self.offset
        if size > self.size - start:
            raise self.error(f"it ends at byte {self.size}, inside a field of {size} bytes that starts at byte {start}")
        self.offset += size
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.map, self.take(struct.calcsize("<" + code)))[0]

    def string(self, strict: bool = True) -> str:
        """A text; where not `strict`, bytes that are not UTF-8 stand as `\\xfc`."""
        size = self.number("Q")
        start = self.take(size)
        if size > _MAX_STRING:
            raise self.error(f"the text at byte {start} has {size} bytes; at most {_MAX_STRING} are read")
        try:
            return self.map[start : start + size].decode("utf-8", "strict" if strict else "backslashreplace")
        except UnicodeDecodeError:
            raise self.error(f"the text at byte {start} is not UTF-8") from None

    def checked_count(self, count: int, least_bytes: int) -> int:
        """A count of things of at least `least_bytes` each, which must fit in what is left of the file."""
        if count * least_bytes > self.size - self.offset:
            raise self.error(
                f"it promises {count} entries at byte {self.offset}, more than fit in its {self.size} bytes"
            )
        self.entries += count
        if self.entries > _MAX_ENTRIES:
            raise self.error(f"its header has more than {_MAX_ENTRIES} entries by byte {self.offset}")
        return count

    def value(self, kind: int, strict: bool) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string(strict)
        if kind == _ARRAY:
            return self._array(self.number("I"), self.number("Q"), strict)
        raise self.error(f"unknown value type {kind} at byte {self.offset}")

    def _array(self, kind: int, count: int, strict: bool) -> list[Any]:
        if kind in _SCALARS:
            code = _SCALARS[kind]
            self.checked_count(count, struct.calcsize("<" + code))
            start = self.take(count * struct.calcsize("<" + code))
            return list(struct.unpack_from(f"<{count}{code}", self.map, start))
        if kind == _STRING:
            self.checked_count(count, 8)
            return [self.string(strict) for _ in range(count)]
        raise self.error(f"unknown array type {kind} at byte {self.offset}")


def _read_start(cursor: _Cursor) -> tuple[int, int, int]:
    magic = bytes(cursor.map[cursor.take(4) : cursor.offset])
    if magic != b"GGUF":
        raise cursor.error(f"it starts with {magic!r} instead of b'GGUF'")
    version = cursor.number("I")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
        raise InputError(f"{cursor.path} is a big-endian GGUF file, which is not read: take the little-endian one")
    if version not in (2, 3):
        raise cursor.error(f"its version is {version}; little-endian versions 2 and 3 are read")
    return version, cursor.number("Q"), cursor.number("Q")


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    dimensions = cursor.number("I")
    if dimensions > _MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} has {dimensions} dimensions; at most {_MAX_DIMENSIONS} are allowed")
    shape = tuple(cursor.number("Q") for _ in range(dimensions))
    return name, shape[::-1], cursor.number("I"), cursor.number("Q")


def _place(cursor: _Cursor, raw: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, TensorInfo]:
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"its alignment {alignment!r} is not a power of two")
    end = data_start = _aligned(cursor.offset, alignment)
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in raw:
        if name in tensors:
            raise cursor.error(f"tensor {name!r} appears twice")
        start, size = _aligned(end, alignment), _byte_size(cursor, name, shape, kind)
        if data_start + offset != start:
            raise cursor.error(
                f"tensor {name!r} claims the offset {offset}, but those before it end at {start - data_start}"
            )
        end = start + size
        if end > cursor.size:
            raise cursor.error(f"tensor {name!r} claims {size} bytes at offset {offset}, past the end of the file")
        tensors[name] = TensorInfo(name, shape, gguf.GGMLQuantizationType(kind), start, size)
    if tensors and cursor.size >= end + alignment:
        # Nothing follows the last tensor that would tell that its type or shape lies, but what it leaves.
        raise cursor.error(f"{cursor.size - end} bytes follow its last tensor {list(tensors)[-1]!r}")
    return tensors


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _byte_size(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int) -> int:
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise cursor.error(f"tensor {name!r} has the unknown type {kind}") from None
    if not shape or 0 in shape or shape[-1] % block:
        raise cursor.error(
            f"tensor {name!r} has the shape {shape}: empty, or rows that are not whole blocks of {block}"
        )
    return math.prod(shape) // block * block_bytes
