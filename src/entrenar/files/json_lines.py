"""JSON lines: one object a line, with the line's number."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.core.errors import InputError


@dataclass(frozen=True)
class Line:
    """One line: its number (from 1) and either its object or what is wrong with it."""

    number: int
    row: dict[str, Any] | None
    problem: str = ""


def read_json_lines(path: Path) -> Iterator[Line]:
    """Every non-blank line of a UTF-8 JSONL file, good or bad; InputError when the file itself cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    yield _parse(number, text)
    except FileNotFoundError:
        raise InputError(f"data file {path} does not exist: check the path in the config") from None
    except UnicodeDecodeError as error:
        raise InputError(f"data file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"data file {path} cannot be read: {error.strerror}") from None


def _parse(number: int, text: str) -> Line:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        return Line(number, None, f"not JSON ({reason})")
    if not isinstance(row, dict):
        return Line(number, None, f"a JSON {type(row).__name__}, not an object")
    return Line(number, row)
