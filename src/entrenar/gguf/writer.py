"""Writes GGUF v3 files, tensor by tensor; gguf/reader.py reads them and describes the layout.

A key of another file is copied as the bytes it is there: whatever a converter put in stays, whether it is known here or
not, and a vocabulary of 49k tokens costs nothing.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
from torch import Tensor

_ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor to write: type (`q4_k`, `f16`, …), shape in PyTorch's order, and what makes its bytes, uint8."""

    name: str
    shape: tuple[int, ...]
    type: str
    make: Callable[[], Tensor]

    @property
    def kind(self) -> gguf.GGMLQuantizationType:
        """The type as ggml numbers it."""
        return gguf.GGMLQuantizationType[self.type.upper()]

    @property
    def size(self) -> int:
        """Its bytes."""
        elements, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // elements * size


def write_gguf_file(path: Path, keys: Mapping[str, Value | bytes], tensors: Sequence[GGUFTensor]) -> None:
    """Write `path`.

    Args:
        keys: int as uint32, float as float32, lists by their first element (int as int32); bytes: a whole entry of
            another file, `GGUFFile.raw_metadata`.
    """
    entries = [value if isinstance(value, bytes) else _entry(key, value) for key, value in keys.items()]
    infos, offset = [], 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        layout = struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, tensor.kind, offset)
        infos.append(_text(tensor.name) + layout)
        offset += _padded(tensor.size)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + b"".join(infos)
    with path.open("wb") as file:
        file.write(header.ljust(_padded(len(header)), b"\0"))
        for tensor in tensors:
            data = tensor.make()
            assert data.numel() == tensor.size
            file.write(data.contiguous().numpy().data)
            file.write(bytes(_padded(tensor.size) - tensor.size))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _entry(key: str, value: Value) -> bytes:
    kind, raw = _value(value)
    return _text(key) + struct.pack("<I", kind) + raw


def _value(value: Value) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _U32, struct.pack("<I", value)
    if isinstance(value, float):
        return _F32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _text(value)
    return _ARRAY, _array(value)


def _array(values: Sequence[str] | Sequence[int] | Sequence[float]) -> bytes:
    if values and isinstance(values[0], str):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(_text(str(value)) for value in values)
    kind, code = (_F32, "f") if values and isinstance(values[0], float) else (_I32, "i")
    return struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values)
