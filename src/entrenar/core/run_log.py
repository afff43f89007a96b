"""`metrics.jsonl`: one JSON object a line, on its way to the disk as it happens."""

import json
import os
from pathlib import Path
from typing import Any

from entrenar.core.atomic import disk_errors, write_text
from entrenar.core.documents import JsonObject, parse_json, read_bytes
from entrenar.core.errors import EntrenarError, InputError

_MOST_BYTES = 4 * 2**30


class MetricsLog:
    """Append-only log of one run; opening it at `after_step` and `after_batch` drops the lines of later steps and of
    later batches that were skipped, so a resumed run's log reads like that of a run that was never stopped."""

    def __init__(self, path: Path, after_step: int = 0, after_batch: int = 0) -> None:
        rows = read_metrics(path) if os.path.lexists(path) else []
        earlier = [row for row in rows if row["step"] <= after_step and row.get("batch", 0) <= after_batch]
        write_text(path, "".join(json.dumps(row) + "\n" for row in earlier))
        with disk_errors(path):
            # Without a buffer: what could not be written would be tried once more when the file is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a `step`."""
        left = (json.dumps(row) + "\n").encode()
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise EntrenarError(
                f"cannot write {self._file.name}: {error.strerror}; make room, and the same command goes on from the "
                "newest checkpoint"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete row of a log; it ends before a line that is none, such as one that a crash cut short.

    Raises:
        InputError: there is no such file, or it is no file.
    """
    rows: list[dict[str, Any]] = []
    for line in read_bytes(path, "metrics file", _MOST_BYTES).split(b"\n"):
        try:
            row = parse_json(line, str(path), JsonObject)
        except InputError:
            break
        if type(row.get("step")) is not int or type(row.get("batch", 0)) is not int:
            break
        rows.append(row)
    return rows
