"""Four shapes of rows, recognised by themselves; bad rows named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.core.errors import InputError
from entrenar.data.rows import Row, read_rows

_USER, _ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
_SHAPES = [
    ({"messages": [_USER, _ASSISTANT]}, "messages"),
    ({"prompt": "Hi", "completion": "Hello"}, "prompt/completion"),
    ({"instruction": "Hi", "output": "Hello"}, "alpaca"),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, "alpaca"),
    ({"instruction": "Hi", "input": None, "output": "Hello"}, "alpaca"),
]
_BAD_ROWS = [
    ({"messages": [_USER]}, "no assistant turn"),
    ({"messages": [_USER, {"role": "assistant", "content": "  "}]}, "no assistant turn"),
    ({"messages": [_ASSISTANT, _USER, _ASSISTANT]}, "the assistant speaks first"),
    ({"messages": []}, "not a list of turns"),
    ({"messages": "Hi"}, "not a list of turns"),
    ({"messages": [{"role": "wizard", "content": "Hi"}, _ASSISTANT]}, "a turn that is not"),
    ({"messages": [{"role": ["user"], "content": "Hi"}, _ASSISTANT]}, "a turn that is not"),
    ({"messages": [{"role": "user", "content": None}, _ASSISTANT]}, "a turn that is not"),
    ({"messages": ["Hi", "Hello"]}, "a turn that is not"),
    ({"prompt": "Hi", "completion": " \n"}, "an empty answer"),
    ({"prompt": ["Hi"], "completion": "Hello"}, "not text"),
    ({"instruction": "Hi", "input": 5, "output": "Hello"}, "an input that is not text"),
    ({"instruction": None, "input": "x", "output": "Hello"}, "not text"),
    ({"text": ""}, "empty"),
    ({"text": 3}, "not a string"),
]


_TEXT = st.text(st.characters(codec="utf-8"))


def _write(path: Path, rows: list[Any]) -> Path:
    """A JSONL file; a string is written as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(("row", "shape"), _SHAPES)
def test_every_shape_of_conversation_is_recognised(tmp_path: Path, row: dict[str, Any], shape: str) -> None:
    file = read_rows(_write(tmp_path / "data.jsonl", [row]))
    assert file.shape == shape
    assert file.rows == [Row(1, (_USER, _ASSISTANT))]
    assert file.rejected == []


def test_plain_text_is_recognised(tmp_path: Path) -> None:
    file = read_rows(_write(tmp_path / "data.jsonl", [{"text": "Once upon a time"}]))
    assert file.shape == "text"
    assert file.rows == [Row(1, text="Once upon a time")]


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "el perro", "output": "the dog"}
    [read] = read_rows(_write(tmp_path / "data.jsonl", [row])).rows
    assert [turn["content"] for turn in read.messages] == ["Translate.\n\nel perro", "the dog"]


def test_all_turns_are_kept_in_order_and_other_keys_left_out(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        _USER,
        _ASSISTANT,
        {"role": "user", "content": "Bye"},
        _ASSISTANT,
    ]
    row = {"messages": [turn | {"weight": 1} for turn in turns], "id": 7}
    [read] = read_rows(_write(tmp_path / "data.jsonl", [row])).rows
    assert list(read.messages) == turns


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text(st.characters(codec="utf-8")), answer=st.text(st.characters(codec="utf-8")), ascii_only=st.booleans()
)
def test_any_text_arrives_unchanged(tmp_path: Path, prompt: str, answer: str, ascii_only: bool) -> None:
    row = json.dumps({"prompt": prompt, "completion": "A" + answer}, ensure_ascii=ascii_only)
    [read] = read_rows(_write(tmp_path / "data.jsonl", [row])).rows
    assert [turn["content"] for turn in read.messages] == [prompt, "A" + answer]


@pytest.mark.parametrize(("row", "reason"), _BAD_ROWS)
def test_a_bad_row_is_refused_with_file_line_and_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = _write(tmp_path / "data.jsonl", ["", row])
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_text_that_is_not_json_is_refused_with_its_line(tmp_path: Path) -> None:
    good = {"prompt": "Hi", "completion": "Hello"}
    path = _write(tmp_path / "data.jsonl", [good, good, '{"prompt": "Hi", "completion": '])
    with pytest.raises(InputError, match=r"data\.jsonl:3: not JSON .*1 of 3 rows"):
        read_rows(path)


def test_one_bad_row_in_a_hundred_is_reported_and_left_out(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"Hi {i}", "completion": "Hello"} for i in range(100)]
    rows[41] = {"prompt": "Hi", "completion": ""}
    path = _write(tmp_path / "data.jsonl", rows)
    file = read_rows(path)
    assert len(file.rows) == 99
    assert [(bad.file, bad.line) for bad in file.rejected] == [(str(path), 42)]
    assert "empty answer" in file.rejected[0].reason


@pytest.mark.parametrize(("bad", "total"), [(1, 99), (2, 100), (2, 199), (101, 10_000)])
def test_more_than_one_percent_of_bad_rows_is_an_error(tmp_path: Path, bad: int, total: int) -> None:
    rows = ["oops"] * bad + [{"text": "fine"}] * (total - bad)
    with pytest.raises(InputError, match=rf"data\.jsonl:1: not JSON.*{bad} of {total} rows"):
        read_rows(_write(tmp_path / "data.jsonl", rows))


@pytest.mark.parametrize(("bad", "total"), [(1, 100), (2, 200), (100, 10_000)])
def test_one_percent_of_bad_rows_is_not(tmp_path: Path, bad: int, total: int) -> None:
    rows = ["oops"] * bad + [{"text": "fine"}] * (total - bad)
    file = read_rows(_write(tmp_path / "data.jsonl", rows))
    assert (len(file.rows), len(file.rejected)) == (total - bad, bad)


def test_a_row_of_another_shape_is_bad(tmp_path: Path) -> None:
    path = _write(tmp_path / "data.jsonl", [{"prompt": "Hi", "completion": "Hello"}, {"text": "Hi"}])
    with pytest.raises(
        InputError, match=r"data\.jsonl:2: a row without prompt, completion, in a file of prompt/completion"
    ):
        read_rows(path)


def test_unknown_keys_are_an_error_that_names_them_and_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.jsonl:1: .*answer, question: rows have messages, or prompt"):
        read_rows(_write(tmp_path / "data.jsonl", [{"question": "Hi", "answer": "Hello"}]))


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.jsonl is empty"):
        read_rows(tmp_path / "data.jsonl")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl does not exist"):
        read_rows(tmp_path / "absent.jsonl")


def test_a_file_of_nothing_but_bad_lines_names_the_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.jsonl:1: not JSON"):
        read_rows(_write(tmp_path / "data.jsonl", ["one", "two"]))
