"""Which tensors of an unfinished merge are on the disk: one JSON line each, appended after their data is flushed.

A line carries a checksum of itself and of the merge, so one that a crash cut short or that was changed since is known,
and it and what follows it count for nothing.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from entrenar.core.atomic import remove_tree
from entrenar.core.documents import parse_json
from entrenar.core.errors import InputError
from entrenar.merging.place import is_own_file

NAME = "journal.jsonl"
Note = list[list[float]]
"""A tensor's numbers for the report (see `execute.py`)."""

_LIMIT = 1 << 28


@dataclass(frozen=True)
class _Line:
    """One tensor; the first line has the merge's digest as its name."""

    name: str
    note: Note
    check: str


class Journal:
    """The journal of a working directory, whose output is locked."""

    def __init__(self, directory: Path) -> None:
        path = directory / NAME
        if os.path.lexists(path) and not (is_own_file(path) and path.stat().st_size <= _LIMIT):
            remove_tree(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o644)
        self._digest = ""

    def read(self, digest: str, sizes: Mapping[str, int]) -> dict[str, Note]:
        """Name → what was noted about it, of a merge with this digest; empty for any other.

        Args:
            sizes: tensor of the merge → rows of its note.
        """
        self._digest = digest
        lines = self._lines()
        first = self._parsed(next(lines, b""))
        if first is None or first.name != digest:
            return {}
        notes: dict[str, Note] = {}
        for text in lines:
            line = self._parsed(text)
            size = sizes.get(line.name) if line else None
            if line is None or size is None or [len(row) for row in line.note] != [size] * size:
                break
            notes[line.name] = line.note
        return notes

    def _lines(self) -> Iterator[bytes]:
        size = os.fstat(self._file).st_size
        return iter(os.pread(self._file, size, 0).splitlines(keepends=True))

    def _parsed(self, text: bytes) -> _Line | None:
        if not text.endswith(b"\n"):
            return None
        try:
            line = parse_json(text, "journal", _Line)
        except InputError:
            return None
        return line if line.check == self._check(line.name, line.note) else None

    def _check(self, name: str, note: Note) -> str:
        text = json.dumps([self._digest, name, note])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def start(self, digest: str, done: Mapping[str, Note]) -> None:
        """Write it anew: the digest and what is done already."""
        self._digest = digest
        os.ftruncate(self._file, 0)
        self.append([(digest, []), *done.items()])

    def append(self, notes: Iterable[tuple[str, Note]]) -> None:
        """Note tensors whose data is flushed."""
        lines = [
            json.dumps({"name": name, "note": note, "check": self._check(name, note)}) + "\n" for name, note in notes
        ]
        left = memoryview("".join(lines).encode())
        while left:
            left = left[os.write(self._file, left) :]
        os.fsync(self._file)

    def close(self) -> None:
        """Let it go."""
        os.close(self._file)
