"""Parquet and Arrow files give the rows that were written, by their numbers; the oracle is JSON and pyarrow itself."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.core.errors import InputError
from entrenar.files.data_file import read_data_file


def _parquet(table: pa.Table, path: Path) -> None:
    pyarrow.parquet.write_table(table, path, row_group_size=100)


def _arrow_file(table: pa.Table, path: Path) -> None:
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


def _arrow_stream(table: pa.Table, path: Path) -> None:
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)


Write = Callable[[pa.Table, Path], None]
_WRITERS: dict[str, Write] = {"parquet": _parquet, "arrow file": _arrow_file, "arrow stream": _arrow_stream}
_every_kind = pytest.mark.parametrize("write", _WRITERS.values(), ids=_WRITERS)


def _read(path: Path) -> list[Any]:
    return [line.row if line.row is not None else line.problem for line in read_data_file(path)]


@_every_kind
def test_rows_come_with_their_numbers(tmp_path: Path, write: Write) -> None:
    rows = [{"prompt": f"Hi {n}", "completion": [{"role": "assistant", "content": "ñ" * (n % 7)}]} for n in range(1003)]
    write(pa.Table.from_pylist(rows), tmp_path / "data.bin")
    lines = list(read_data_file(tmp_path / "data.bin"))
    assert [line.number for line in lines] == list(range(1, 1004))
    assert [line.row for line in lines] == rows


_KEYS = st.sampled_from(["a", "b", "c"])
_LEAF = st.text(max_size=3) | st.integers(-(2**40), 2**40) | st.booleans()


@st.composite
def _rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows whose structs differ in their keys, each key of one type wherever it stands."""
    kinds = {key: draw(st.sampled_from(["text", "number", "list", "object"])) for key in "abc"}

    def value(key: str, depth: int) -> Any:
        if kinds[key] == "object" and depth < 3:
            return {inner: value(inner, depth + 1) for inner in draw(st.sets(_KEYS, min_size=1))}
        if kinds[key] == "list":
            return draw(st.lists(st.text(max_size=3), min_size=1, max_size=2))
        return draw(st.text(max_size=3)) if kinds[key] == "text" else draw(st.integers(-9, 9))

    return [{"id": n, "tools": [{"x": value("a", 0), "n": n}, {"y": value("b", 0)}]} for n in range(draw(st.just(4)))]


@_every_kind
@given(rows=_rows())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_keys_that_a_row_does_not_have_stay_absent(tmp_path: Path, write: Write, rows: list[dict[str, Any]]) -> None:
    write(pa.Table.from_pylist(rows), tmp_path / "data.bin")
    assert _read(tmp_path / "data.bin") == rows


@_every_kind
def test_tools_do_not_get_each_others_properties(tmp_path: Path, write: Write) -> None:
    def tool(**properties: Any) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
        return {"type": "function", "function": {"name": "f", "parameters": parameters}}

    call = {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    other = {"function": {"name": "f", "arguments": {"day": 3}}}
    rows = [
        {"tools": [tool(city={"type": "string"}), tool(day={"type": "integer", "enum": [1, 2]})],
         "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call, other]}]},
        {"tools": None, "messages": [{"role": "user", "content": "y"}]},
    ]  # fmt: skip
    write(pa.Table.from_pylist(rows), tmp_path / "data.bin")
    assert _read(tmp_path / "data.bin") == rows


def test_maps_lists_and_json_columns_keep_their_nulls(tmp_path: Path) -> None:
    table = pa.table(
        {
            "map": pa.array([[("a", 1), ("b", None)]], pa.map_(pa.string(), pa.int64())),
            "list": pa.array([[1, None]]),
            "json": pa.array(['{"unit": null, "n": [null]}'], pa.json_()),
            "none": pa.array([None], pa.string()),
            "word": pa.array(["x"]).dictionary_encode(),
            "large": pa.array([["x"]], pa.large_list(pa.large_string())),
        }
    )
    _arrow_file(table, tmp_path / "data.arrow")
    assert _read(tmp_path / "data.arrow") == [
        {"map": {"a": 1, "b": None}, "list": [1, None], "json": {"unit": None, "n": [None]}, "none": None,
         "word": "x", "large": ["x"]},
    ]  # fmt: skip


def test_times_that_python_has_no_type_for_are_no_obstacle(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "when": pa.array([1_700_000_000_000_000_001], pa.timestamp("ns", "UTC"))})
    _parquet(table, tmp_path / "data.parquet")
    assert _read(tmp_path / "data.parquet") == [{"text": "a", "when": 1_700_000_000_000_000_001}]


def test_a_value_that_is_no_text_is_a_problem_of_its_row(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())})
    _arrow_stream(table, tmp_path / "data.arrow")
    first, second, third = _read(tmp_path / "data.arrow")
    assert (first, third) == ({"text": "a"}, {"text": "c"})
    assert "a value that cannot be read ('utf-8' codec" in second


@_every_kind
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_one_sentence(tmp_path: Path, write: Write, share: float) -> None:
    write(pa.table({"text": [f"row {n} " * 20 for n in range(1000)]}), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: round(len(content) * share)])
    with pytest.raises(InputError, match=r"data file .*cut is an? (Parquet|Arrow).* cut short") as error:
        _read(tmp_path / "cut")
    assert "\n" not in str(error.value)


def test_a_stream_cut_between_two_batches_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    _arrow_stream(pa.table({"text": ["a", "b"]}), tmp_path / "data.arrow")
    (tmp_path / "data.arrow").write_bytes((tmp_path / "data.arrow").read_bytes()[:-8])
    with pytest.raises(InputError, match="an Arrow stream without its end mark, so it is cut short"):
        _read(tmp_path / "data.arrow")


def test_damage_is_told_with_the_last_whole_row(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{n * 7919 % 10007}" * 30 for n in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "data", row_group_size=256, compression="zstd")
    content = bytearray((tmp_path / "data").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = b"\xff" * 400
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(InputError, match=r"a Parquet file that is cut short or damaged after row (256|512) \("):
        _read(tmp_path / "data")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    _arrow_file(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "data.arrow")
    with pytest.raises(InputError, match=r"data\.arrow has text twice"):
        _read(tmp_path / "data.arrow")


@_every_kind
def test_never_more_than_a_part_is_in_memory(tmp_path: Path, write: Write) -> None:
    row = json.dumps({"x": "y" * 2000})
    write(pa.table({"text": [row] * 20_000}), tmp_path / "data.bin")  # 40 MB
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    count = 0
    for _ in read_data_file(tmp_path / "data.bin"):
        count += 1
        assert count % 5000 or pa.total_allocated_bytes() - before < 10_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 10_000_000
