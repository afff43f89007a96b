"""A tensor that lies in a file: where, and how its bytes become numbers. It is read whole or piece by piece.

Bytes are copied out of the file, never mapped: a file that is cut or replaced meanwhile is an InputError, and not a
SIGBUS or a model that changes (docs/decisions/0009).
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from entrenar.core.errors import InputError

PIECE_ELEMENTS = 1 << 21  # 4 MB of bf16: smaller ones cost time in Python, larger ones memory
# Every piece but a tensor's last is a multiple of this: whole blocks of every GGUF type and of every block size.
ALIGNMENT = 4096


@dataclass(frozen=True)
class FileVersion:
    """A file as it was when its header was read; in another, the header's offsets would point at garbage."""

    path: Path
    identity: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, descriptor: int) -> "FileVersion":
        """The version that an open descriptor of `path` has."""
        return cls(path, _identity(descriptor))

    @contextmanager
    def open(self) -> Iterator[int]:
        """A descriptor of the file again.

        Raises:
            InputError: it is gone, or no longer the same; also for whatever goes wrong while it is read.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                if _identity(descriptor) != self.identity:
                    raise InputError(f"{self.path} has changed since its header was read: load it again")
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from None


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        start, size: its bytes in the file.
        shape, dtype: of the numbers that `decode` makes.
        decode: (bytes,) uint8 → (n,) `dtype`, flat; a whole tensor or pieces of it. The result may be a view.
        group: how many elements, or a multiple, `decode` needs together.
    """

    file: FileVersion
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    decode: Callable[[Tensor], Tensor]
    group: int = 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def step(self) -> int:
        """What ranges start at multiples of: 1 for plain numbers."""
        plain = self.group == 1 and self.size == self.numel * self.dtype.itemsize
        return 1 if plain else math.lcm(ALIGNMENT, self.group)

    @property
    def piece_elements(self) -> int:
        """Elements of every piece but the last."""
        step = math.lcm(ALIGNMENT, self.group)
        return max(PIECE_ELEMENTS // step, 1) * step

    @property
    def piece_bytes(self) -> int:
        """Bytes of the largest piece."""
        return self.bytes_of(min(self.piece_elements, self.numel))

    def starts(self) -> range:
        """The first element of every piece; an empty tensor has one piece too."""
        return range(0, max(self.numel, 1), self.piece_elements)

    def read_piece(self, start: int, buffer: Tensor) -> Tensor:
        """The elements (n,) of the piece from `start`, perhaps a view of `buffer` (`piece_bytes` or more,) uint8."""
        return self.read_range(start, min(self.piece_elements, self.numel - start), buffer)

    def read_range(self, start: int, count: int, buffer: Tensor) -> Tensor:
        """The `count` elements from `start`, both multiples of `step` (but at the end); see `read_piece`."""
        raw = buffer[: self.bytes_of(count)]
        self._fill(self.bytes_of(start), raw)
        return self.decode(raw)

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        raw = torch.empty(self.size, dtype=torch.uint8)
        self._fill(0, raw)
        return self.decode(raw).view(self.shape)

    def first_bytes(self, count: int) -> bytes:
        """Its first `count` bytes in the file, or as many as it has."""
        return self.bytes_at(0, min(count, self.size))

    def bytes_at(self, offset: int, count: int) -> bytes:
        """`count` of its bytes in the file, from its `offset`-th."""
        raw = torch.empty(count, dtype=torch.uint8)
        self._fill(offset, raw)
        return raw.numpy().tobytes()

    def bytes_of(self, elements: int) -> int:
        """Bytes that so many elements take in the file."""
        return elements * self.size // max(self.numel, 1)

    def _fill(self, offset: int, raw: Tensor) -> None:
        """Fill raw (n,) uint8 with the tensor's bytes from `offset`."""
        left, place = raw.numpy().data, self.start + offset
        with self.file.open() as descriptor:
            while left:
                count = os.preadv(descriptor, [left], place)
                if not count:
                    raise InputError(f"{self.file.path} ends inside a tensor: fetch or save it again")
                left, place = left[count:], place + count
