"""Four shapes of rows, recognised by themselves; bad rows named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.core.errors import InputError
from entrenar.data.rows import Row, read_rows
from entrenar.data.turns import unused_keys

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
    ({"messages": [_USER, _ASSISTANT | {"weight": 0}]}, "every assistant turn has weight 0"),
    ({"messages": [_USER, _ASSISTANT | {"weight": 0.5}]}, "weight 0.5: allowed are 0 and 1"),
    ({"messages": [_USER, _ASSISTANT | {"train": "no"}]}, "train 'no'"),
    ({"messages": [_USER | {"train": True}, _ASSISTANT]}, "train: true in a turn of user"),
    ({"messages": [_USER, _ASSISTANT | {"loss_mask": 0, "mask": 1}]}, "with loss_mask, mask, which is not supported"),
    ({"messages": [_USER, _ASSISTANT | {"trainable": False}]}, "weight: 0 or train: false keep a turn"),
    ({"messages": [_USER, _ASSISTANT | {"loss": 0}]}, "with loss, which is not supported"),
    ({"prompt": "Hi", "completion": "Hello", "train": False}, "a row with train"),
    ({"prompt": "Hi", "completion": "Hello", "history": [["a", "b"]]}, "a row with history"),
    ({"prompt": "Hi", "completion": "Hello", "tools": 0}, "tools that are not a list of objects"),
    ({"instruction": "Hi", "input": 0, "output": "Hello"}, "an input that is not text"),
    ({"instruction": "Hi", "history": 0, "output": "Hello"}, "a history that is not a list"),
    ({"messages": [_USER, _ASSISTANT | {"function_call": {"arguments": "{}"}}]}, "tool_calls that are not a list"),
    (
        {"messages": [_USER, _ASSISTANT | {"function_call": {"name": "f"}, "tool_calls": [{"name": "f"}]}]},
        "function_call and tool_calls: keep one",
    ),
    ({"conversations": [{"from": "wizard", "value": "Hi"}]}, "a turn from 'wizard': allowed are system"),
    ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "a turn from ['human']: allowed are system"),
    ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "function_call whose value is not JSON"),
    ({"conversations": [{"from": "human", "value": 3}]}, "a turn that is not"),
    ({"messages": [_USER, _ASSISTANT], "conversations": [_USER]}, "a row with conversations"),
    ({"input_ids": []}, "input_ids that are not a list of token ids"),
    ({"input_ids": [1, -2]}, "input_ids that are not a list of token ids"),
    ({"input_ids": [1, True]}, "input_ids that are not a list of token ids"),
    ({"input_ids": [1, 2], "labels": [1]}, "labels that are not one for each"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "not shifted"),
    ({"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [0, 1]}, "keep one"),
    ({"input_ids": [1, 2], "completion_mask": [0, 2]}, "completion_mask that is not a 0 or 1"),
    ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "an attention_mask that is not 1"),
    ({"input_ids": [1, 2], "labels": [1, -100]}, "no token of input_ids is trained"),
    ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "a row with loss_mask"),
    ({"messages": [_USER, _ASSISTANT | {"tool_calls": "f()"}]}, "tool_calls that are not a list"),
    ({"messages": [_USER, _ASSISTANT | {"tool_calls": [{"function": {"arguments": {}}}]}]}, "tool_calls that are not"),
    ({"messages": [_USER | {"tool_calls": [{"function": {"name": "f"}}]}, _ASSISTANT]}, "tool_calls in a turn of user"),
    ({"messages": [_USER, _ASSISTANT | {"reasoning_content": ["x"]}]}, "reasoning_content that is not text"),
    ({"messages": [_USER, _ASSISTANT | {"reasoning": "a", "thinking": "b"}]}, "reasoning, thinking, which differ"),
    ({"messages": [_USER, _ASSISTANT | {"content": [{"type": "image", "url": "x"}]}]}, "not text (image)"),
    ({"messages": [_USER, _ASSISTANT], "tools": "[{"}, "tools that are not a list of objects"),
    ({"messages": [_USER, _ASSISTANT], "tools": ["f"]}, "tools that are not a list of objects"),
    ({"messages": [_USER, _ASSISTANT], "functions": [{"name": "f"}], "tools": [{"name": "f"}]}, "tools that are"),
    ({"messages": [_USER, _ASSISTANT], "images": ["x.png"]}, "a row with images"),
    ({"messages": [_USER, _ASSISTANT], "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs that are not"),
    ({"messages": [{"role": "system", "content": "x"}, _USER, _ASSISTANT], "system": "y"}, "another system text"),
    ({"prompt": "Hi", "completion": "Hello", "label": False}, "a row with label"),
    ({"prompt": "Hi", "completion": "Hello", "system": 3}, "a system that is not text"),
    ({"instruction": "Hi", "output": "Hello", "history": [["a"]]}, "a history that is not a list"),
    ({"text": 3}, "not a string"),
    ({"messages": [_USER, _ASSISTANT | {"content": [{"type": "text", "text": "a", "loss": 0}]}]}, "text with loss"),
    ({"messages": [_USER, _ASSISTANT | {"meta": {"train": False}}]}, "with meta, which is not supported"),
    ({"prompt": "Hi", "completion": "<think></think>\u200b"}, "an empty answer"),
    ({"messages": [_USER, _ASSISTANT | {"content": "\ufeff"}]}, "no assistant turn with text"),
    ({"messages": [_USER, _ASSISTANT], "prompt": "Well?"}, "a row with prompt"),
]
# Keys of a turn that say, or may say, whether it is trained; none is another's prefix or in another letter case only.
_SWITCHES: list[tuple[str, Any]] = [
    ("loss", 0), ("loss", False), ("loss", True), ("trainable", False), ("training", 0), ("mask", 0), ("mask", False),
    ("masked", True), ("label", 0), ("label", False), ("loss_mask", 0), ("loss_mask", [0]), ("loss_weight", 0.0),
    ("ignore", True), ("skip", False), ("learn", False), ("is_masked", True), ("train_on", 0), ("doTrain", False),
    ("include_in_loss", False), ("no_loss", 1), ("trainable", "no"), ("end", False), ("eos", 0), ("use", False),
    ("supervised", "n"), ("lossMask", [1, 0]), ("TRAIN_THIS", 0), ("active", 0), ("keep", [True]), ("weights", 1),
    ("score", True), ("train_detail", "x"), ("prefix", True), ("step_loss", 0),
]  # fmt: skip
_TOLD = {
    "id": 3, "score": 0.5, "timestamp": 1.7e9, "index": 0, "lang": "en", "created_at": 5, "tokenIds": [1, 2],
    "uuid": "a", "step": 0, "num_tokens": 7, "source": "web", "note": {"by": "me"}, "labels": None, "mask": [],
}  # fmt: skip
_COLUMNS: dict[str, Any] = {
    "train": False, "loss": 0, "weight": 0, "weights": [0, 1], "mask": [0], "completion_mask": [0],
    "assistant_masks": [0], "sample_weight": 0, "loss_mask": 0, "train_on_turns": [1], "mask_history": True,
    "trainOnLast": True, "enable_thinking": True, "reasoning_content": "so", "reasoning": "so", "thinking": "so",
    "tool_calls": [{"function": {"name": "f"}}], "available_tools": [{"name": "f"}], "rejected_messages": [_USER],
    "rejected_response": "no", "label": 0, "labels": [1], "input_ids": [1], "images": ["x"], "documents": ["x"],
    "chat_template": "x", "developer": "x", "system_instruction": "x", "context": "Elsewhere",
}  # fmt: skip


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


_SYSTEM = {"role": "system", "content": "Be brief."}
_BESIDE = [
    ({"prompt": "Hi", "completion": "Hello", "system": "Be brief."}, (_SYSTEM, _USER, _ASSISTANT)),
    ({"instruction": "Hi", "output": "Hello", "system_prompt": "Be brief."}, (_SYSTEM, _USER, _ASSISTANT)),
    ({"messages": [_USER, _ASSISTANT], "system": "Be brief."}, (_SYSTEM, _USER, _ASSISTANT)),
    ({"messages": [_USER, _ASSISTANT], "system": "", "images": [], "label": None}, (_USER, _ASSISTANT)),
    ({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]]}, (_USER, _ASSISTANT) * 2),
    ({"instruction": "Hi", "output": "Hello", "history": [], "system": None}, (_USER, _ASSISTANT)),
    ({"prompt": [_USER], "completion": [_ASSISTANT]}, (_USER, _ASSISTANT)),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H", "cache_control": {"type": "x"}},
                                                {"text": "i"}]}, _ASSISTANT]},
     (_USER, _ASSISTANT)),
    ({"messages": [turn | dict.fromkeys(("tool_calls", "weight", "reasoning_content")) for turn in (_USER, _ASSISTANT)],
      "tools": None}, (_USER, _ASSISTANT)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "turns"), _BESIDE)
def test_what_stands_beside_the_turns_is_honoured(tmp_path: Path, row: dict[str, Any], turns: Any) -> None:
    file = read_rows(_write(tmp_path / "data.jsonl", [row]))
    assert file.rows == [Row(1, turns)]
    assert file.unused == []


def test_tools_calls_and_options_are_kept(tmp_path: Path) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        _USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1", "name": "f"},
        _ASSISTANT | {"reasoning_content": "so"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for written in (tools, json.dumps(tools)):
        row = {"messages": turns, "tools": written, "chat_template_kwargs": {"deep": True}}
        [read] = read_rows(_write(tmp_path / "data.jsonl", [row])).rows
        assert read.messages == (_USER, {"role": "assistant", "tool_calls": [call]}, *turns[2:])
        assert read.tools == tuple(tools)
        assert read.options == {"deep": True}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}])
def test_turns_are_marked_not_to_be_trained(tmp_path: Path, mark: dict[str, Any]) -> None:
    turns = [_USER, _ASSISTANT | mark, _USER, _ASSISTANT | {"weight": 1, "train": True}]
    plain = (_USER, _ASSISTANT, _USER, _ASSISTANT)
    [read] = read_rows(_write(tmp_path / "data.jsonl", [{"messages": turns}])).rows
    assert read == Row(1, plain, untrained=frozenset([1]), marked=frozenset([3]))
    [read] = read_rows(_write(tmp_path / "data.jsonl", [{"messages": turns, "system": "Be brief."}])).rows
    assert read == Row(1, (_SYSTEM, *plain), untrained=frozenset([2]), marked=frozenset([4]))
    [read] = read_rows(_write(tmp_path / "data.jsonl", [{"prompt": turns[:3], "completion": turns[3:]}])).rows
    assert read == Row(1, plain, untrained=frozenset([1]), marked=frozenset([3]))


def test_of_a_prompt_of_turns_no_answer_is_trained(tmp_path: Path) -> None:
    [read] = read_rows(
        _write(tmp_path / "data.jsonl", [{"prompt": [_USER, _ASSISTANT, _USER], "completion": [_ASSISTANT]}])
    ).rows
    assert read.untrained == frozenset([1])


@pytest.mark.parametrize(("key", "value"), _SWITCHES)
def test_a_key_that_may_say_what_is_trained_is_refused_whatever_its_value(tmp_path: Path, key: str, value: Any) -> None:
    turns = [_USER, _ASSISTANT | {key: value}, _USER, _ASSISTANT]
    with pytest.raises(InputError, match=rf":1: a turn with {key}, which is not supported"):
        read_rows(_write(tmp_path / "data.jsonl", [{"messages": turns}]))


def test_keys_that_only_tell_something_about_a_turn_pass(tmp_path: Path) -> None:
    [read] = read_rows(_write(tmp_path / "data.jsonl", [{"messages": [_USER | _TOLD, _ASSISTANT | _TOLD]}])).rows
    assert read.untrained == frozenset()
    assert unused_keys(read.messages) == sorted(set(_TOLD) - {"labels"})


@pytest.mark.parametrize("key", _COLUMNS)
@pytest.mark.parametrize("shape", [row for row, _ in _SHAPES[:3]] + [{"text": "Once"}], ids=lambda row: next(iter(row)))
def test_a_column_that_says_what_is_trained_or_shown_is_refused(
    tmp_path: Path, shape: dict[str, Any], key: str
) -> None:
    with pytest.raises(InputError, match=rf":1: a row with {key}, which is not supported in"):
        read_rows(_write(tmp_path / "data.jsonl", [shape | {key: _COLUMNS[key]}]))
    assert read_rows(_write(tmp_path / "data.jsonl", [shape | {key: None}])).unused == []


@pytest.mark.parametrize("key", ["tools", "system", "system_prompt", "chat_template_kwargs", "completion", "history"])
def test_beside_plain_text_stands_no_conversation(tmp_path: Path, key: str) -> None:
    with pytest.raises(InputError, match=f"a row with {key}, which is not supported in text rows"):
        read_rows(_write(tmp_path / "data.jsonl", [{"text": "Once", key: "x"}]))


@pytest.mark.parametrize("key", ["history", "input", "context"])
def test_a_part_of_a_conversation_that_no_shape_reads_is_refused_unless_a_turn_holds_it(
    tmp_path: Path, key: str
) -> None:
    row = {"prompt": "Of the river: where is it?", "completion": "Hello"}
    with pytest.raises(InputError, match=f"a row with {key}"):
        read_rows(_write(tmp_path / "data.jsonl", [row | {key: "Of the sea"}]))
    assert read_rows(_write(tmp_path / "data.jsonl", [row | {key: "the river"}])).unused == [key]


def test_a_shape_at_null_is_not_there(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "completion": "Hello", "messages": None}
    assert read_rows(_write(tmp_path / "data.jsonl", [row])).shape == "prompt/completion"


def test_columns_that_nothing_reads_are_named(tmp_path: Path) -> None:
    rows = [
        {"messages": [_USER, _ASSISTANT], "id": 3, "score": float("nan"), "note": None},
        {"messages": [_USER, _ASSISTANT], "id": 4, "source": "web", "tools": None},
    ]
    assert read_rows(_write(tmp_path / "data.jsonl", rows)).unused == ["id", "score", "source"]
    assert read_rows(_write(tmp_path / "data.jsonl", [{"text": "x", "url": "y"}])).unused == ["url"]


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


def test_a_turn_that_is_not_the_assistants_may_say_that_it_is_not_trained(tmp_path: Path) -> None:
    row = {"messages": [_USER | {"loss": False, "trainable": 0}, _ASSISTANT]}
    assert len(read_rows(_write(tmp_path / "data.jsonl", [row])).rows) == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("data.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}', "jsonl:1: an object with prompt twice"),
        ("data.json", '[{"messages": [{"role": "user", "content": "a", "content": "b"}]}]', "with content twice"),
        ("data.csv", "prompt,prompt,completion\na,b,c\n", "data.csv:1: a header that names prompt twice"),
    ],
)  # fmt: skip
def test_one_name_for_two_values_is_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason):
        read_rows(tmp_path / name)


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
