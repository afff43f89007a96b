"""Rows of a Parquet or Arrow file, a few at a time, as the objects that JSON would give.

A field of a struct is there in every row, null where a row has it not: `datasets` gives the `properties` of each tool
the keys of all other tools. So a null field below a column is taken as a key that is not there. A null that means
something, as in a call's arguments, has to be written as JSON text; a map, a list, a JSON column are as they stand.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
from pyarrow import types

from entrenar.core.errors import InputError, listing
from entrenar.files.json_lines import Line

_ROWS = 256  # that are turned into objects at a time
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_REMEDY = "copy or write it again"


def columnar_rows(raw: BinaryIO, path: Path, kind: str) -> Iterator[Line]:
    """Every row of an open file by its number in it (from 1). `kind`: what its first bytes say, such as "a Parquet
    file"; `path` names it in errors.

    Raises:
        InputError: the file is cut short or damaged; the last whole row before that is named.
    """
    number = 0
    try:
        for batch in _batches(raw, path, kind):
            _refuse_twins(batch.schema.names, path)
            for line in _lines(batch, number):
                number = line.number
                yield line
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        where = f" after row {number}" if number else ""
        what = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"data file {path} is {kind} that is cut short or damaged{where} ({what}): {_REMEDY}"
        ) from None


def _batches(raw: BinaryIO, path: Path, kind: str) -> Iterator[pa.RecordBatch]:
    if kind == "a Parquet file":
        file = pyarrow.parquet.ParquetFile(raw)
        yield from file.iter_batches(_ROWS, use_threads=False)
    elif kind == "an Arrow file":
        reader = pyarrow.ipc.open_file(raw)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        _refuse_open_end(raw, path)
        yield from pyarrow.ipc.open_stream(raw)


def _refuse_open_end(raw: BinaryIO, path: Path) -> None:
    """A stream that breaks off between two batches is read to its last one without an error: its end mark tells."""
    size = raw.seek(0, os.SEEK_END)
    raw.seek(max(size - len(_END_OF_STREAM), 0))
    has_end = raw.read() == _END_OF_STREAM
    raw.seek(0)
    if not has_end:
        raise InputError(f"data file {path} is an Arrow stream without its end mark, so it is cut short: {_REMEDY}")


def _refuse_twins(names: list[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"data file {path} has {listing(twice)} twice: keep one column of each name")


def _lines(batch: pa.RecordBatch, before: int) -> Iterator[Line]:
    batch = _plain_times(batch)
    for start in range(0, batch.num_rows, _ROWS):
        part = batch.slice(start, _ROWS)
        try:
            objects: list[Any] = _objects(part)
        except (pa.ArrowException, ValueError, OverflowError):  # one bad row: the others are read
            objects = [_object_or_problem(part.slice(index, 1)) for index in range(part.num_rows)]
        for number, row in enumerate(objects, start=before + start + 1):
            yield Line(number, None, row) if isinstance(row, str) else Line(number, row)


def _plain_times(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Points in time as numbers: nobody reads them, and nanoseconds have no Python type."""
    for index, field in enumerate(batch.schema):
        if types.is_timestamp(field.type) or types.is_time64(field.type) or types.is_duration(field.type):
            batch = batch.set_column(index, field.name, batch.column(index).cast(pa.int64()))
    return batch


def _object_or_problem(row: pa.RecordBatch) -> dict[str, Any] | str:
    try:
        return _objects(row)[0]
    except (pa.ArrowException, ValueError, OverflowError) as error:
        return f"a value that cannot be read ({error})"


def _objects(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    columns = [
        [_given(value, field.type) for value in column.to_pylist(maps_as_pydicts="strict")]
        for field, column in zip(batch.schema, batch.columns, strict=True)
    ]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _given(value: Any, kind: pa.DataType) -> Any:
    """A value without the null fields of its structs."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if types.is_struct(kind):
        return {field.name: _given(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if types.is_map(kind):
        return {key: _given(item, kind.item_type) for key, item in value.items()}
    if _is_list(kind):
        return [_given(item, kind.value_type) for item in value]
    return value


def _is_list(kind: pa.DataType) -> bool:
    tests = (
        types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view
    )  # fmt: skip
    return any(test(kind) for test in tests)
