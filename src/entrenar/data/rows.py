"""Read training rows and bring their four shapes into one: a conversation, or plain text.

Shapes, recognised by their keys: `messages`; `prompt` + `completion`; `instruction` (+ `input`) + `output` (alpaca);
`text`. Beside a conversation may stand `tools`, `system`, `chat_template_kwargs` and, in alpaca, `history`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from entrenar.core.errors import InputError, listing
from entrenar.data.key_names import is_given, says_what_is_trained
from entrenar.data.spoken import is_silent, says_something
from entrenar.data.turns import Message, read_turns
from entrenar.files.data_file import Line, read_data_file

__all__ = ["Message", "Rejected", "Row", "RowFile", "check_share", "read_rows"]

# Above this share of unusable rows a file is taken to be wrong as a whole.
MAX_BAD_SHARE = 0.01
_SYSTEM = ("system", "system_prompt", "system_message")
_BESIDE = ("tools", "chat_template_kwargs", *_SYSTEM)
# Columns that say what is shown in a way that is not honoured; those of `key_names` say what is trained.
_REFUSED = (
    "functions", "function_call", "documents", "images", "image", "videos", "video", "audio", "audios", "input_ids",
    "chat_template", "enable_thinking", "reasoning_content", "reasoning", "thinking", "tool_calls", "available_tools",
    "sys", "system_instruction", "system_instructions", "developer", "attention_mask", "mask_history",
)  # fmt: skip
# Columns that may hold a part of the conversation: refused where a shape does not read them and no turn holds them.
_PARTS = ("history", "input", "context")
_PARTS_BESIDE_TURNS = ("prompt", "completion", "instruction", "output")


@dataclass(frozen=True)
class Row:
    """One usable row: a conversation (`messages`) or plain `text`, and the line it stood on.

    `tools` and `options` (a row's `chat_template_kwargs`) are for the chat template; `untrained`: assistant turns that
    the row says not to train on, by their index.
    """

    line: int
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Rejected:
    """One unusable row and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class RowFile:
    """The rows of one file; `shape` is the recognised one, `unused` the columns that nothing reads, `total` counts the
    bad rows too."""

    path: Path
    shape: str
    rows: list[Row]
    rejected: list[Rejected]
    unused: list[str] = field(default_factory=list)
    total: int = 0


def read_rows(path: Path) -> RowFile:
    """Read a file of rows of one shape.

    Raises:
        InputError: the file is missing or empty, its shape is not known, or more than 1% of its rows are bad (file,
            line and reason of the first are named).
    """
    lines = list(read_data_file(path))
    if not lines:
        raise InputError(f"data file {path} is empty: it needs one JSON object a line")
    shape = _recognise(path, lines)
    rows, rejected = list[Row](), list[Rejected]()
    unused = dict[str, None]()
    for line in lines:
        row = _convert(shape, line)
        if isinstance(row, Row):
            rows.append(row)
            unused |= dict.fromkeys(_unused(shape, line.row or {}))
        else:
            rejected.append(Rejected(str(path), line.number, row))
    check_share(rejected, len(lines))
    return RowFile(path, shape, rows, rejected, list(unused), len(lines))


def check_share(rejected: list[Rejected], total: int) -> None:
    """InputError if more than 1% of a file's `total` rows are unusable, whoever found them so."""
    if len(rejected) > MAX_BAD_SHARE * total:
        first = min(rejected, key=lambda bad: bad.line)
        raise InputError(
            f"{first.file}:{first.line}: {first.reason}; {len(rejected)} of {total} rows are unusable, more than 1%: "
            "mend or remove them"
        )


def _recognise(path: Path, lines: list[Line]) -> str:
    first = next((line for line in lines if line.row is not None), None)
    if first is None or first.row is None:
        raise InputError(f"{path}:{lines[0].number}: {lines[0].problem}: the file needs one JSON object a line")
    for there in ({key for key, value in first.row.items() if value is not None}, set(first.row)):
        for shape, (keys, *_) in _SHAPES.items():
            if there.issuperset(keys):
                return shape
    raise InputError(
        f"{path}:{first.number}: a row with the keys {listing(sorted(first.row))}: rows have messages, or prompt and "
        "completion, or instruction and output, or text"
    )


def _convert(shape: str, line: Line) -> Row | str:
    """The row, or what is wrong with it."""
    if line.row is None:
        return line.problem
    keys, _, convert = _SHAPES[shape]
    missing = [key for key in keys if key not in line.row]
    if missing:
        return f"a row without {listing(missing)}, in a file of {shape} rows"
    row = convert(line.row, line.number)
    if isinstance(row, str):
        return row
    refused = [key for key in _unused(shape, line.row) if _is_refused(shape, key, line.row[key], row)]
    if refused:
        return (
            f"a row with {listing(refused)}, which is not supported in {shape} rows: leave the column out, or set it "
            "to null"
        )
    return row if row.text else _beside(row, line.row)


def _is_refused(shape: str, key: str, value: Any, row: Row) -> bool:
    """Whether a column that is not read says something about what is trained or shown."""
    if key in _PARTS or (shape == "messages" and key in _PARTS_BESIDE_TURNS):
        said = row.text or "\0".join(str(turn.get("content")) for turn in row.messages)
        return not isinstance(value, str) or value.strip() not in said
    beside = row.text and key in (*_BESIDE, "completion")
    return key in _REFUSED or says_what_is_trained(key) or bool(beside)


def _unused(shape: str, row: Mapping[str, Any]) -> list[str]:
    keys, more, _ = _SHAPES[shape]
    used = {*keys, *more}
    return [key for key, value in row.items() if key not in used and is_given(value)]


def _beside(row: Row, given: dict[str, Any]) -> Row | str:
    """The row with the tools, the system turn and the template's options that stand beside its turns."""
    tools, options = _list_of(given.get("tools")), given.get("chat_template_kwargs")
    options = options if is_given(options) else {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return "tools that are not a list of objects"
    if not isinstance(options, dict) or {"messages", "tools", "add_generation_prompt"} & set(options):
        return "chat_template_kwargs that are not an object of a template's own options"
    row = replace(row, tools=tuple(tools), options=options)
    named = [key for key in _SYSTEM if is_given(given.get(key))]
    if not named:
        return _check_answers(row)
    system = given[named[0]]
    if not isinstance(system, str):
        return f"a {named[0]} that is not text"
    if len(named) > 1 or row.messages[0]["role"] in ("system", "developer"):
        return f"a row with {listing(named)} beside another system text: keep one"
    turns = ({"role": "system", "content": system}, *row.messages)
    return _check_answers(replace(row, messages=turns, untrained=frozenset(index + 1 for index in row.untrained)))


def _list_of(value: Any) -> Any:
    """A list, also as JSON in a string; nothing is an empty one."""
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value if is_given(value) else []


def _check_answers(row: Row) -> Row | str:
    answers = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant" and says_something(turn)]
    if not answers:
        return "no assistant turn with text, so nothing to train on"
    if row.untrained.issuperset(answers):
        return "every assistant turn has weight 0 or train false, so nothing to train on"
    if row.messages[0]["role"] == "assistant":
        return "the assistant speaks first, so nothing leads to its answer"
    return row


def _from_messages(row: dict[str, Any], line: int) -> Row | str:
    read = read_turns(row["messages"])
    return read if isinstance(read, str) else Row(line, read.messages, untrained=read.untrained)


def _exchange(line: int, prompt: Any, answer: Any, before: tuple[Message, ...] = ()) -> Row | str:
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return "a prompt or answer that is not text"
    if is_silent(answer):
        return "an empty answer, so nothing to train on"
    return Row(line, (*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def _from_prompt(row: dict[str, Any], line: int) -> Row | str:
    """Two texts, or two lists of turns, of which the completion's are trained."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        return _exchange(line, prompt, completion)
    first, second = read_turns(prompt, "prompt"), read_turns(completion, "completion")
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    size = len(first.messages)
    aside = {i for i, turn in enumerate(first.messages) if turn["role"] == "assistant"}
    aside |= {size + index for index in second.untrained}
    return Row(line, first.messages + second.messages, untrained=frozenset(aside))


def _from_alpaca(row: dict[str, Any], line: int) -> Row | str:
    context = row["input"] if is_given(row.get("input")) else ""
    if not isinstance(context, str):
        return "an input that is not text"
    instruction = row["instruction"]
    joined = f"{instruction}\n\n{context}" if context and isinstance(instruction, str) else instruction
    history = _list_of(row.get("history"))
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        return "a history that is not a list of [question, answer]"
    before = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return _exchange(line, joined, row["output"], tuple(before))


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _from_text(row: dict[str, Any], line: int) -> Row | str:
    if not isinstance(row["text"], str) or not row["text"]:
        return "a text that is empty or not a string"
    return Row(line, text=row["text"])


_Converter = Callable[[dict[str, Any], int], Row | str]
# Shape → the keys that make it, those that may stand beside them, and what reads it.
_SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], _Converter]] = {
    "messages": (("messages",), _BESIDE, _from_messages),
    "prompt/completion": (("prompt", "completion"), _BESIDE, _from_prompt),
    "alpaca": (("instruction", "output"), ("input", "history", *_BESIDE), _from_alpaca),
    "text": (("text",), (), _from_text),
}
