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
        with path.open(encoding="utf-8-sig") as file:
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
        if "\\ud" in text.lower():
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text: no tokenizer takes it
    except RecursionError:
        return Line(number, None, "not JSON (nested too deeply)")
    except ValueError as error:  # JSONDecodeError, a number of thousands of digits, half of a surrogate pair
        return Line(number, None, f"not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else error})")
    if not isinstance(row, dict):
        return Line(number, None, f"a JSON {type(row).__name__}, not an object")
    return Line(number, row)
