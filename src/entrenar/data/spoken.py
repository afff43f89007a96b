"""What a turn says, in pieces, and whether all of it is in the answer that a template writes.

Pieces are the texts between tags that templates treat on their own, and the names, keys and values of every call.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from entrenar.core.errors import InputError
from entrenar.data.template import REASONING_KEYS, Turn
from entrenar.data.turn_end import AddedTokens

_THOUGHT = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
# Marks, controls and white space: nothing that a reader sees (zero-width space, byte order mark, soft hyphen).
_UNSEEN = ("Cf", "Cc", "Zs", "Zl", "Zp")


def is_silent(text: str, ends: Sequence[str] = ()) -> bool:
    """Whether a text holds no word: white space, what has no width, the tags of an empty thought, `ends` of a turn."""
    for end in ends:
        text = text.replace(end, "")
    return all(unicodedata.category(character) in _UNSEEN for character in _THOUGHT.sub("", text))


def says_something(turn: Turn, ends: Sequence[str] = ()) -> bool:
    """Whether there is anything in an assistant's turn to train on."""
    spoken = [turn.get("content"), *(turn.get(key) for key in REASONING_KEYS)]
    return bool(turn.get("tool_calls")) or any(isinstance(text, str) and not is_silent(text, ends) for text in spoken)


def pieces(text: str, added: AddedTokens) -> list[str]:
    """The texts between added tokens and the tags of thoughts; a text of nothing else is one piece."""
    parts = [part.strip() for whole in added.split(text) for part in _THOUGHT.split(whole)]
    return [part for part in parts if part] or ([text.strip()] if not is_silent(text) else [])


def check_said(turn: Turn, text: str, added: AddedTokens) -> list[str]:
    """The pieces of what a turn says as the answer `text` holds them, one after the other, each in a place of its own.

    Raises:
        InputError: one is not there, or the answer goes on after what is said last.
    """
    said, spans, place = list(_texts(turn, added)), list[tuple[int, int]](), 0
    for number, (key, piece) in enumerate(said):
        start = text.find(piece, place)
        is_last = number + 1 == len(said) and not turn.get("tool_calls")
        if start < 0 or (is_last and not (pieces(text, added) or [""])[-1].endswith(piece)):
            raise _left_out(piece, key, text)
        place = start + len(piece)
        spans.append((start, place))
    place = 0
    for call in turn.get("tool_calls") or ():
        start = place
        for forms in sorted(_call_pieces(call), key=lambda forms: -len(forms[0])):
            span = _free(text, forms, start, spans)
            if span is None:
                raise _left_out(forms[0], "tool_calls", text)
            spans.append(span)
            place = max(place, span[1])
    return [text[first:last] for first, last in spans]


def written_forms(piece: str) -> list[str]:
    """A text as it stands, and as a JSON string holds it."""
    return list(dict.fromkeys([piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1]]))


def _left_out(piece: str, key: str, text: str) -> InputError:
    shown = piece if len(piece) <= 40 else piece[:40] + "…"
    ending = text if len(text) <= 40 else "…" + text[-40:]
    return InputError(
        f"the model's chat template leaves out or rewrites what the assistant says: {shown!r} of its {key} is not in "
        f"the answer it writes, {ending!r}; mend the row, or use a template that keeps it"
    )


def _texts(turn: Turn, added: AddedTokens) -> Iterator[tuple[str, str]]:
    reasoning = next((key for key in REASONING_KEYS if turn.get(key)), None)
    for key in (reasoning, "content"):
        yield from ((key, piece) for piece in pieces(turn.get(key) or "", added)) if key else ()


def _free(text: str, forms: list[str], start: int, taken: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The first place of any form that lies in none that is `taken`; a number is no part of a longer word."""
    is_word = len(forms) > 1 and forms[-1] == ""
    pattern = "|".join(map(re.escape, filter(None, forms)))
    whole = rf"(?<![\w.])(?:{pattern})(?!\w|\.\d)" if is_word else pattern
    matches = re.compile(whole).finditer(text, start)
    return next((m.span() for m in matches if not any(m.start() < b and a < m.end() for a, b in taken)), None)


def _call_pieces(call: Any) -> Iterator[list[str]]:
    """Each piece of a call in the forms that it may be written in; numbers end with an empty one, see `_free`."""
    function = call.get("function", call)
    yield written_forms(str(function.get("name", "")))
    yield from _leaves(function.get("arguments"))


def _leaves(value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (written_forms(str(key)), *_leaves(item))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, bool | int | float):
        yield [json.dumps(value), str(value), ""]
    elif isinstance(value, str) and value.strip():
        yield written_forms(value)
