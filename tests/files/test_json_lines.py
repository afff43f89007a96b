"""JSON and CSV: each line with its number, and what is wrong with it."""

import gzip
import json
from pathlib import Path

import pytest

from entrenar.core.errors import InputError
from entrenar.files.data_file import read_data_file


def _lines(tmp_path: Path, content: bytes) -> list[tuple[int, object, str]]:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    return [(line.number, line.row, line.problem) for line in read_data_file(path)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_lines_keep_their_numbers_past_blank_ones(tmp_path: Path, newline: bytes) -> None:
    content = newline.join([b'{"a": 1}', b"", b"   ", '{"b": "ñ\\u2028"}'.encode()])
    assert _lines(tmp_path, content) == [(1, {"a": 1}, ""), (4, {"b": "ñ\u2028"}, "")]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    assert _lines(tmp_path, b'\xef\xbb\xbf{"a": 1}\n') == [(1, {"a": 1}, "")]


def test_an_escaped_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    assert _lines(tmp_path, b'{"a": "\\ud83d\\ude00"}') == [(1, {"a": "\U0001f600"}, "")]


_NO_JSON = {
    "cut": b'{"a": ',
    "words": b"hello",
    "two objects": b'{"a": 1} {"b": 2}',
    "nested too deeply": b"[" * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "half of a surrogate pair": b'{"a": ["\\uD800 hi"]}',
}


@pytest.mark.parametrize("text", _NO_JSON.values(), ids=_NO_JSON)
def test_a_line_that_is_not_json_is_told_apart_and_reading_goes_on(tmp_path: Path, text: bytes) -> None:
    [first, second] = _lines(tmp_path, text + b'\n{"a": 1}\n')
    assert (first[0], first[1]) == (1, None)
    assert first[2].startswith("not JSON (")
    assert second == (2, {"a": 1}, "")


@pytest.mark.parametrize(("text", "kind"), [(b"[1]", "list"), (b'"x"', "str"), (b"3", "int"), (b"null", "NoneType")])
def test_a_line_that_is_not_an_object_is_a_problem(tmp_path: Path, text: bytes, kind: str) -> None:
    assert _lines(tmp_path, text) == [(1, None, f"a JSON {kind}, not an object")]


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl does not exist"):
        list(read_data_file(tmp_path / "absent.jsonl"))
    with pytest.raises(InputError, match="is a directory, not a file"):
        list(read_data_file(tmp_path))


def test_a_file_that_is_not_utf8_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        _lines(tmp_path, '{"a": "ñ"}'.encode("latin-1"))


_ROWS = [{"a": 1}, {"a": "x\ny"}]
_PRETTY = json.dumps(_ROWS, indent=1)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (_PRETTY, [2, 5]),
        (json.dumps(_ROWS), [1, 1]),
        ("\ufeff\n" + _PRETTY + "\n\n", [3, 6]),
        ("[\n]", []),
        (" [ ] ", []),
    ],
)
def test_the_objects_of_one_array_are_rows_by_their_lines(tmp_path: Path, text: str, lines: list[int]) -> None:
    assert _lines(tmp_path, text.encode()) == [(n, row, "") for n, row in zip(lines, _ROWS, strict=False)]


def test_what_is_no_object_in_an_array_is_a_problem(tmp_path: Path) -> None:
    assert _lines(tmp_path, b'[{"a": 1},\n 3]')[1] == (2, None, "a JSON int, not an object")


@pytest.mark.parametrize("text", [b'[{"a": 1},\n{"a": ', b'[{"a": 1}\n{"a": 2}]', b'[{"a": 1},\n'])
def test_an_array_that_breaks_off_is_named_with_the_line(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(InputError, match=r"data\.jsonl:\d: a JSON array that breaks off"):
        _lines(tmp_path, text)


def test_lists_on_lines_of_their_own_are_no_array(tmp_path: Path) -> None:
    assert _lines(tmp_path, b'[{"a": 1}]\n[{"a": 2}]\n') == [(n, None, "a JSON list, not an object") for n in (1, 2)]


@pytest.mark.parametrize(("name", "separator"), [("data.csv", ","), ("data.TSV", "\t"), ("data.csv.gz", ",")])
def test_csv_is_read_by_its_name(tmp_path: Path, name: str, separator: str) -> None:
    text = (
        separator.join(("instruction", "output")) + "\r\n" + separator.join(("Say hi", '"He said ""hi"",\nand went"'))
    )
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    [line] = read_data_file(tmp_path / name)
    assert line.row == {"instruction": "Say hi", "output": 'He said "hi",\nand went'}


def test_a_csv_record_with_too_many_cells_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b\n1,2,3\n", encoding="utf-8")
    [line] = read_data_file(tmp_path / "data.csv")
    assert (line.number, line.problem) == (2, "more cells than the header has")
