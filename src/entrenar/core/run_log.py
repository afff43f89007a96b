"""`metrics.jsonl`: one JSON object a line, appended and flushed as it happens."""

import json
from pathlib import Path
from typing import Any

from entrenar.core.atomic import write_text
from entrenar.core.errors import EntrenarError


class MetricsLog:
    """Append-only log of one run; opening it at `after_step` drops the lines of later steps, so a resumed run's
    log reads like that of a run that was never stopped."""

    def __init__(self, path: Path, after_step: int = 0) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= after_step] if path.exists() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a `step`."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise EntrenarError(
                f"cannot write {self._file.name}: {error.strerror}; make room, and the same command goes on from the "
                "newest checkpoint"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete row of a log; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
