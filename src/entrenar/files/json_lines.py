"""Rows in a file: JSON, one object a line or in one array, plain or gzipped; or CSV. Each row with its line's number.

A file of another kind is recognised by its first bytes and refused by its name, with what to do.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from entrenar.core.documents import open_regular, reason
from entrenar.core.errors import InputError, listing

_MOST_LINE = 2**28  # characters of one line, and bytes of a file that is one JSON value
_DECODER = json.JSONDecoder()
_OTHERS = (
    (b"PAR1", "a Parquet file", "write its rows as JSON lines: pandas' to_json(orient='records', lines=True)"),
    (b"ARROW1", "an Arrow file", "write its rows as JSON lines: datasets' to_json"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write its rows as JSON lines: datasets' to_json"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "decompress it: zstd -d"),
    (b"\xfd7zXZ", "compressed with xz", "decompress it: xz -d"),
    (b"BZh", "compressed with bzip2", "decompress it: bzip2 -d"),
    (b"PK\x03\x04", "a ZIP archive (or a spreadsheet)", "extract it, or export it as CSV"),
    (b"SQLite format 3", "a SQLite database", "export its rows as JSON lines"),
    (codecs.BOM_UTF32_LE, "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One row: its line's number (from 1) and either its object or what is wrong with it."""

    number: int
    row: dict[str, Any] | None
    problem: str = ""


def read_json_lines(path: Path) -> Iterator[Line]:
    """Every row of a UTF-8 file, good or bad: its non-blank lines, the objects of its one array, or its CSV records.

    Raises:
        InputError: the file cannot be read, or is of another kind, which is named.
    """
    try:
        with open_regular(path, "data file") as raw:
            plain = _decompressed(raw, path)
            _refuse_others(plain, path)
            text = io.TextIOWrapper(plain, encoding="utf-8-sig", newline="" if _separator(path) else None)
            yield from _rows(text, path)
    except UnicodeDecodeError as error:
        raise InputError(f"data file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data file {path} cannot be read: {reason(error)}") from None


def _decompressed(raw: BinaryIO, path: Path) -> BinaryIO:
    compressed = _head(raw, 2) == b"\x1f\x8b"
    plain = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw
    if compressed and _head(plain, 2) == b"\x1f\x8b":
        raise InputError(f"data file {path} is compressed twice: decompress it once")
    return plain


def _head(file: BinaryIO, size: int) -> bytes:
    start = file.read(size)
    file.seek(0)
    return start


def _refuse_others(file: BinaryIO, path: Path) -> None:
    start = _head(file, 64)
    kinds = [(name, remedy) for magic, name, remedy in _OTHERS if start.startswith(magic)]
    if not kinds and re.match(rb"[^\x00]\x00[^\x00]\x00|\x00[^\x00]\x00[^\x00]", start):
        kinds = [("UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8")]
    if kinds:
        name, remedy = kinds[0]
        raise InputError(f"data file {path} is {name}, not JSON lines: {remedy}")


def _separator(path: Path) -> str:
    names = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return {".csv": ",", ".tsv": "\t"}.get(names[-1].lower() if names else "", "")


def _rows(text: io.TextIOWrapper, path: Path) -> Iterator[Line]:
    separator = _separator(path)
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
