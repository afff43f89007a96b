"""Rows of the field's other shapes say what the same row in OpenAI's says."""

import json
from pathlib import Path
from typing import Any

import pytest

from entrenar.core.errors import InputError
from entrenar.data.rows import read_rows
from entrenar.data.shapes import Row

_CALL = {"name": "room_light", "arguments": {"room": "hall", "level": 3}}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Dim the hall."},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": _CALL}]},
    {"role": "tool", "content": '{"ok": true}'},
    {"role": "assistant", "content": "Done."},
]
_SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "Dim the hall."},
    {"from": "function_call", "value": json.dumps(_CALL)},
    {"from": "observation", "value": '{"ok": true}'},
    {"from": "gpt", "value": "Done."},
]
_TOOL = {"name": "room_light", "description": "Set a light.", "parameters": {"type": "object", "properties": {}}}


def _read(path: Path, row: dict[str, Any], **options: Any) -> Row:
    file = path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    [read] = read_rows(file, **options).rows
    return read


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": _SHAREGPT},
        {"messages": _SHAREGPT},
        {"conversations": _MESSAGES},
        {"conversations": _SHAREGPT[1:], "system": "Be brief."},
        {"messages": [*_MESSAGES[:2], {"role": "assistant", "content": None, "function_call": _CALL}, *_MESSAGES[3:]]},
        {"messages": [*_MESSAGES[:3], {"role": "function", "content": '{"ok": true}'}, *_MESSAGES[4:]]},
    ],
)
def test_one_conversation_in_many_words(tmp_path: Path, row: dict[str, Any]) -> None:
    assert _read(tmp_path, row).messages == tuple(_MESSAGES)


@pytest.mark.parametrize("value", [[_TOOL], json.dumps([_TOOL])])
def test_functions_of_old_are_tools(tmp_path: Path, value: Any) -> None:
    read = _read(tmp_path, {"messages": _MESSAGES, "functions": value})
    assert read.tools == ({"type": "function", "function": _TOOL},)


def test_several_calls_of_one_sharegpt_turn(tmp_path: Path) -> None:
    turns = [*_SHAREGPT[:2], {"from": "function_call", "value": json.dumps([_CALL, _CALL])}, *_SHAREGPT[3:]]
    calls = _read(tmp_path, {"conversations": turns}).messages[2]["tool_calls"]
    assert calls == [{"type": "function", "function": _CALL}] * 2


@pytest.mark.parametrize(
    ("more", "mask"),
    [
        ({}, (True, True, True)),
        ({"labels": [-100, 7, 9]}, (False, True, True)),
        ({"completion_mask": [0, 0, 1]}, (False, False, True)),
        ({"assistant_masks": [0, 1, 0], "attention_mask": [1, 1, 1]}, (False, True, False)),
    ],
)
def test_token_ids_are_trained_as_labels_or_masks_say(
    tmp_path: Path, more: dict[str, Any], mask: tuple[bool, ...]
) -> None:
    assert _read(tmp_path, {"input_ids": [5, 7, 9], **more}) == Row(1, ids=(5, 7, 9), mask=mask)


def test_columns_have_the_names_of_the_file(tmp_path: Path) -> None:
    row = {"chat": _MESSAGES, "instructions_to_the_model": "x"}
    assert _read(tmp_path, row, columns={"messages": "chat"}).messages == tuple(_MESSAGES)
    swapped = {"completion": "Hi", "prompt": "Hello"}
    read = _read(tmp_path, swapped, columns={"prompt": "completion", "completion": "prompt"})
    assert [turn["content"] for turn in read.messages] == ["Hi", "Hello"]
    with pytest.raises(InputError, match=r"a row without chat, which data\.columns names"):
        _read(tmp_path, {"messages": _MESSAGES}, columns={"messages": "chat"})
    with pytest.raises(InputError, match="reads messages from chat, and the row has messages as well"):
        _read(tmp_path, {"messages": _MESSAGES, "chat": _MESSAGES}, columns={"messages": "chat"})
