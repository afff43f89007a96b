"""Which tensors of an unfinished merge are on the disk: one JSON line each, appended after their data is flushed."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from entrenar.core.errors import EntrenarError

NAME = "journal.jsonl"


class Journal:
    """The journal of a working directory, held by one process at a time.

    The first line is the digest of everything that decides the result's bytes; a line that a crash cut short, and what
    follows it, is dropped.

    Raises:
        EntrenarError: another process is merging into the same output.
    """

    def __init__(self, directory: Path) -> None:
        self._file = (directory / NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise EntrenarError(
                f"another process is writing {directory}: wait for it or choose another output"
            ) from None

    def read(self, digest: str) -> dict[str, Any]:
        """Name → what was noted about it, of a merge with this digest; empty for any other."""
        self._file.seek(0)
        rows = []
        for line in self._file.read().splitlines(keepends=True):
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith("\n"):
                rows.pop()
        if not rows or rows[0] != {"digest": digest}:
            return {}
        return {row["name"]: row["note"] for row in rows[1:]}

    def start(self, digest: str, done: dict[str, Any]) -> None:
        """Write it anew: the digest and what is done already."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"digest": digest}) + "\n")
        self.append(done.items())

    def append(self, notes: Iterable[tuple[str, Any]]) -> None:
        """Note tensors whose data is flushed."""
        for name, note in notes:
            self._file.write(json.dumps({"name": name, "note": note}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let it go."""
        self._file.close()
