"""Rows in a text: JSON, one object a line or in one array; or CSV. Each row with its line's number."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.core.errors import InputError, listing

_MOST_LINE = 2**28  # characters of one line, and bytes of a file that is one JSON value
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Line:
    """One row: its number (of its line, or of the row in a file without lines; from 1) and either its object or what is
    wrong with it."""

    number: int
    row: dict[str, Any] | None
    problem: str = ""


def text_rows(text: io.TextIOWrapper, path: Path, separator: str) -> Iterator[Line]:
    """Every row of a text, good or bad: its non-blank lines, the objects of its one array, or, where `separator` is
    not empty, its CSV records. `path` names the file in errors.

    Raises:
        InputError: the text as a whole is of another kind, which is named.
    """
    if separator:
        return _records(text, path, separator)
    begin = text.read(1024)
    text.seek(0)
    if re.match(r"\s*\[\s*(?:[{\]]|$)", begin):
        array = _array(text.read(_MOST_LINE + 1), path)
        if array is not None:
            return iter(array)
        text.seek(0)
    return _lines(text, path)


def _lines(text: io.TextIOWrapper, path: Path) -> Iterator[Line]:
    number, is_first = 0, True
    while line := text.readline(_MOST_LINE):
        number += 1
        if len(line) == _MOST_LINE and not line.endswith("\n"):
            raise InputError(f"data file {path} has a line of more than {_MOST_LINE:,} characters at {number}")
        if line.strip():
            row = _parse(number, line)
            if is_first and row.row is None:
                _refuse_one_object(line, text, path)
            is_first = False
            yield row


def _refuse_one_object(first: str, text: io.TextIOWrapper, path: Path) -> None:
    """A first line that is no row may be the beginning of an object over several lines, or of a CSV file."""
    if first.strip().startswith("{"):
        value, end = _first_value(first + text.read(_MOST_LINE))
        _back_to_second(text, first)
        if end > len(first):
            raise InputError(
                f"data file {path} begins with one JSON object over several lines (keys: {listing(sorted(value))}): "
                f"write each row as an object on a line of its own (jq -c), or all rows as one array"
            )
    header = [cell.strip().strip('"') for cell in first.split(",")]
    if len(header) > 1 and {"messages", "prompt", "completion", "instruction", "output", "text"} & set(header):
        raise InputError(f"data file {path} looks like CSV, by its first line: name it .csv, or write JSON lines")


def _first_value(text: str) -> tuple[Any, int]:
    """The JSON value that a text begins with and where it ends: 0 where there is none."""
    try:
        return _DECODER.raw_decode(text, _past_space(text, 0))
    except (ValueError, RecursionError):
        return {}, 0


def _back_to_second(text: io.TextIOWrapper, first: str) -> None:
    text.seek(0)
    while text.readline(_MOST_LINE) != first:
        continue


def _array(text: str, path: Path) -> list[Line] | None:
    """The objects of one JSON array by the lines they begin on; None if the text is something else."""
    if len(text) > _MOST_LINE:
        raise InputError(
            f"data file {path} is one JSON array of more than {_MOST_LINE:,} characters: write one object a line"
        )
    lines, place, number, counted = list[Line](), text.index("[") + 1, 1, 0
    while True:
        place = _past_space(text, place)
        if text[place : place + 1] == "]":
            return lines if not text[place + 1 :].strip() else None
        number, counted = number + text.count("\n", counted, place), place
        try:
            _, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise InputError(
                f"{path}:{number}: a JSON array that breaks off or is wrong in the value that begins here ({what})"
            ) from None
        lines.append(_parse(number, text[place:end]))
        place = _past_space(text, end)
        if text[place : place + 1] == ",":
            place += 1
        elif text[place : place + 1] != "]":
            raise InputError(f"{path}:{number}: a JSON array that breaks off after the value that begins here")


def _past_space(text: str, place: int) -> int:
    while text[place : place + 1].isspace():
        place += 1
    return place


def _records(text: io.TextIOWrapper, path: Path, separator: str) -> Iterator[Line]:
    reader = csv.DictReader(text, delimiter=separator, strict=True)
    try:
        twice = [name for name in _twice(reader.fieldnames or []) if name]
        if twice:
            raise InputError(f"{path}:1: a header that names {listing(twice)} twice: keep one column of each name")
        for record in reader:
            if None in record:
                yield Line(reader.line_num, None, "more cells than the header has")
            else:
                yield Line(reader.line_num, {key: value for key, value in record.items() if value is not None})
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not CSV ({error})") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; one that has a key twice says two things, of which JSON readers keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise InputError(f"an object with {listing(_twice([key for key, _ in pairs]))} twice: keep one")
    return value


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _parse(number: int, text: str) -> Line:
    try:
        row = json.loads(text, object_pairs_hook=_without_twins)
        if "\\ud" in text.lower():
            json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text: no tokenizer takes it
    except InputError as error:
        return Line(number, None, str(error))
    except RecursionError:
        return Line(number, None, "not JSON (nested too deeply)")
    except ValueError as error:  # JSONDecodeError, a number of thousands of digits, half of a surrogate pair
        return Line(number, None, f"not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else error})")
    if not isinstance(row, dict):
        return Line(number, None, f"a JSON {type(row).__name__}, not an object")
    return Line(number, row)
