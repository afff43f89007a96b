"""Read the rows of a file: one of the shapes of data/shapes.py, recognised by its keys, and what stands beside it.

Beside a conversation may stand `tools`, a system text and `chat_template_kwargs`. A column that would change what is
shown or trained, and that nothing here reads, is refused by name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from entrenar.core.errors import InputError, listing
from entrenar.data.key_names import is_given, says_what_is_trained
from entrenar.data.shapes import BESIDE, SHAPES, SYSTEM, Row, list_of
from entrenar.data.spoken import says_something
from entrenar.data.turns import Message
from entrenar.files.data_file import Line, read_data_file

__all__ = ["Message", "Rejected", "Row", "RowFile", "check_share", "places", "read_rows"]

# Above this share of unusable rows a file is taken to be wrong as a whole.
MAX_BAD_SHARE = 0.01
# Columns that say what is shown in a way that is not honoured; those of `key_names` say what is trained.
_REFUSED = (
    "function_call", "documents", "images", "image", "videos", "video", "audio", "audios", "input_ids",
    "chat_template", "enable_thinking", "reasoning_content", "reasoning", "thinking", "tool_calls", "available_tools",
    "sys", "system_instruction", "system_instructions", "developer", "attention_mask", "position_ids", "mask_history",
)  # fmt: skip
# Columns that may hold a part of the conversation: refused where a shape does not read them and no turn holds them.
_PARTS = ("history", "input", "context", "conversations")
_PARTS_BESIDE_TURNS = ("prompt", "completion", "instruction", "output")


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


def read_rows(path: Path, columns: Mapping[str, str] | None = None) -> RowFile:
    """Read a file of rows of one shape. `columns`: our name of a column → the file's.

    Raises:
        InputError: the file is missing or empty, its shape is not known, or more than 1% of its rows are bad (file,
            line and reason of the first are named).
    """
    lines = [_renamed(line, columns or {}) for line in read_data_file(path)]
    if not lines:
        raise InputError(f"data file {path} is empty: it needs one JSON object a line")
    shape = _recognise(path, lines)
    rows, rejected = list[Row](), list[Rejected]()
    unused = dict[str, None]()
    for line in lines:
        row = _convert(shape, line)
        if isinstance(row, Row):
            rows.append(replace(row, file=str(path)))
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


def places(rows: Iterable[Row]) -> str:
    """Where rows stand: lines 3, 4 of a.jsonl; 7 of b.jsonl."""
    lines = dict[str, set[int]]()
    for row in rows:
        lines.setdefault(row.file, set()).add(row.line)
    named = (f"{', '.join(map(str, sorted(lines[file])))} of {file}" for file in sorted(lines))
    return "lines " + "; ".join(named)


def _renamed(line: Line, columns: Mapping[str, str]) -> Line:
    """The row under our names of its columns."""
    row = line.row
    if row is None or not columns:
        return line
    missing = [column for column in columns.values() if column not in row]
    clash = [name for name in columns if name not in columns.values() and is_given(row.get(name))]
    if missing or clash:
        problem = f"a row without {listing(missing)}, which data.columns names"
        if not missing:
            problem = f"data.columns reads {clash[0]} from {columns[clash[0]]}, and the row has {clash[0]} as well"
        return replace(line, row=None, problem=problem)
    rest = {key: value for key, value in row.items() if key not in columns.values() and key not in columns}
    return replace(line, row=rest | {name: row[column] for name, column in columns.items()})


def _recognise(path: Path, lines: list[Line]) -> str:
    first = next((line for line in lines if line.row is not None), None)
    if first is None or first.row is None:
        raise InputError(f"{path}:{lines[0].number}: {lines[0].problem}: the file needs one JSON object a line")
    for there in ({key for key, value in first.row.items() if value is not None}, set(first.row)):
        for shape, (keys, *_) in SHAPES.items():
            if there.issuperset(keys):
                return shape
    raise InputError(
        f"{path}:{first.number}: a row with the keys {listing(sorted(first.row))}: rows have messages, or prompt and "
        "completion, or instruction and output, or conversations, or input_ids, or text"
    )


def _convert(shape: str, line: Line) -> Row | str:
    """The row, or what is wrong with it."""
    if line.row is None:
        return line.problem
    keys, _, convert = SHAPES[shape]
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
    return _beside(row, line.row) if row.messages else row


def _is_refused(shape: str, key: str, value: Any, row: Row) -> bool:
    """Whether a column that is not read says something about what is trained or shown."""
    if row.ids:
        return says_what_is_trained(key) or key == "position_ids"
    if key in _PARTS or (shape in ("messages", "ShareGPT") and key in _PARTS_BESIDE_TURNS):
        said = row.text or "\0".join(str(turn.get("content")) for turn in row.messages)
        return not isinstance(value, str) or value.strip() not in said
    beside = not row.messages and key in (*BESIDE, "completion")
    return key in _REFUSED or says_what_is_trained(key) or bool(beside)


def _unused(shape: str, row: Mapping[str, Any]) -> list[str]:
    keys, more, _ = SHAPES[shape]
    used = {*keys, *more}
    return [key for key, value in row.items() if key not in used and is_given(value)]


def _beside(row: Row, given: dict[str, Any]) -> Row | str:
    """The row with the tools, the system turn and the template's options that stand beside its turns."""
    tools, options = _tools(given), given.get("chat_template_kwargs")
    options = options if is_given(options) else {}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return "tools that are not a list of objects"
    if not isinstance(options, dict) or {"messages", "tools", "add_generation_prompt"} & set(options):
        return "chat_template_kwargs that are not an object of a template's own options"
    row = replace(row, tools=tuple(tools), options=options)
    named = [key for key in SYSTEM if is_given(given.get(key))]
    if not named:
        return _check_answers(row)
    system = given[named[0]]
    if not isinstance(system, str):
        return f"a {named[0]} that is not text"
    if len(named) > 1 or row.messages[0]["role"] in ("system", "developer"):
        return f"a row with {listing(named)} beside another system text: keep one"
    turns = ({"role": "system", "content": system}, *row.messages)
    later = {name: frozenset(index + 1 for index in getattr(row, name)) for name in ("untrained", "marked")}
    return _check_answers(replace(row, messages=turns, **later))


def _tools(given: dict[str, Any]) -> Any:
    """`tools`, or the `functions` of old as such."""
    if is_given(given.get("tools")) and is_given(given.get("functions")):
        return "both tools and functions"
    functions = list_of(given.get("functions"))
    if not isinstance(functions, list) or not functions:
        return list_of(given.get("tools")) if functions == [] else functions
    return [{"type": "function", "function": function} for function in functions]


def _check_answers(row: Row) -> Row | str:
    answers = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant" and says_something(turn)]
    if not answers:
        return "no assistant turn with text, so nothing to train on"
    if row.untrained.issuperset(answers):
        return "every assistant turn has weight 0 or train false, so nothing to train on"
    return row
