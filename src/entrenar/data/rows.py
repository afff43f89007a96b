"""Read training rows and bring their four shapes into one: a conversation, or plain text.

Shapes, recognised by their keys: `messages`; `prompt` + `completion`; `instruction` (+ `input`) + `output` (alpaca);
`text`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.core.errors import InputError, listing
from entrenar.files.json_lines import Line, read_json_lines

Message = dict[str, str]
# Above this share of unusable rows a file is taken to be wrong as a whole.
MAX_BAD_SHARE = 0.01
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One usable row: a conversation (`messages`) or plain `text`, and the line it stood on."""

    line: int
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Rejected:
    """One unusable row and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True)
class RowFile:
    """The rows of one file; `shape` is the recognised one."""

    path: Path
    shape: str
    rows: list[Row]
    rejected: list[Rejected]


def read_rows(path: Path) -> RowFile:
    """Read a JSONL file of one shape.

    Raises:
        InputError: the file is missing or empty, its shape is not known, or more than 1% of its rows are bad (file,
            line and reason of the first are named).
    """
    lines = list(read_json_lines(path))
    if not lines:
        raise InputError(f"data file {path} is empty: it needs one JSON object a line")
    shape = _recognise(path, lines)
    rows, rejected = [], []
    for line in lines:
        row = _convert(shape, line)
        if isinstance(row, Row):
            rows.append(row)
        else:
            rejected.append(Rejected(str(path), line.number, row))
    if len(rejected) > MAX_BAD_SHARE * len(lines):
        first = rejected[0]
        raise InputError(
            f"{path}:{first.line}: {first.reason}; {len(rejected)} of {len(lines)} rows are unusable, more than 1%: "
            "mend or remove them"
        )
    return RowFile(path, shape, rows, rejected)


def _recognise(path: Path, lines: list[Line]) -> str:
    first = next((line for line in lines if line.row is not None), None)
    if first is None or first.row is None:
        raise InputError(f"{path}:{lines[0].number}: {lines[0].problem}: the file needs one JSON object a line")
    for shape, (keys, _) in _SHAPES.items():
        if all(key in first.row for key in keys):
            return shape
    raise InputError(
        f"{path}:{first.number}: a row with the keys {listing(sorted(first.row))}: rows have messages, or prompt and "
        "completion, or instruction and output, or text"
    )


def _convert(shape: str, line: Line) -> Row | str:
    """The row, or what is wrong with it."""
    if line.row is None:
        return line.problem
    keys, convert = _SHAPES[shape]
    missing = [key for key in keys if key not in line.row]
    if missing:
        return f"a row without {listing(missing)}, in a file of {shape} rows"
    return convert(line.row, line.number)


def _from_messages(row: dict[str, Any], line: int) -> Row | str:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return "messages is not a list of turns"
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES or not isinstance(turn.get("content"), str):
            return f"a turn that is not {{role: {' | '.join(_ROLES)}, content: text}}"
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        return "no assistant turn with text, so nothing to train on"
    if messages[0]["role"] == "assistant":
        return "the assistant speaks first, so nothing leads to its answer"
    return Row(line, tuple({"role": turn["role"], "content": turn["content"]} for turn in messages))


def _exchange(line: int, prompt: Any, answer: Any) -> Row | str:
    if not isinstance(prompt, str) or not isinstance(answer, str):
        return "a prompt or answer that is not text"
    if not answer.strip():
        return "an empty answer, so nothing to train on"
    return Row(line, ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}))


def _from_prompt(row: dict[str, Any], line: int) -> Row | str:
    return _exchange(line, row["prompt"], row["completion"])


def _from_alpaca(row: dict[str, Any], line: int) -> Row | str:
    context = row.get("input") or ""
    if not isinstance(context, str):
        return "an input that is not text"
    instruction = row["instruction"]
    joined = f"{instruction}\n\n{context}" if context and isinstance(instruction, str) else instruction
    return _exchange(line, joined, row["output"])


def _from_text(row: dict[str, Any], line: int) -> Row | str:
    if not isinstance(row["text"], str) or not row["text"]:
        return "a text that is empty or not a string"
    return Row(line, text=row["text"])


_SHAPES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], int], Row | str]]] = {
    "messages": (("messages",), _from_messages),
    "prompt/completion": (("prompt", "completion"), _from_prompt),
    "alpaca": (("instruction", "output"), _from_alpaca),
    "text": (("text",), _from_text),
}
