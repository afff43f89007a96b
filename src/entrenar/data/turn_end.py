"""What ends an answer in a model's chat template, found by rendering a small conversation; and where generation stops.

Everybody who needs it asks here: the mask of trained tokens, generation, exact match.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.data.template import ChatTemplate, Turn

# Words that no template writes; they differ in their first letter and their last, so that a common prefix or suffix of
# two renders holds nothing of them.
SENTINELS = ("Zq7", "Kx3")
_ASKED: Turn = {"role": "user", "content": "Hm?"}
_CALL_ID = "call00001"  # nine letters and digits, as some templates ask
_TOOL = {
    "type": "function",
    "function": {
        "name": "Zq7",
        "description": "Hm.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "Hm."}}},
    },
}
_TOLD: Turn = {"role": "tool", "tool_call_id": _CALL_ID, "name": "Zq7", "content": "Hm."}


@dataclass(frozen=True)
class TurnEnd:
    """How a template goes on after an answer's text.

    `tail`: what it writes when nothing follows. `closing`: what ends the turn, up to and with the token that generation
    stops at; it begins `tail`, unless the template closes no turn. Then it is the token that opens the next turn
    (`opens_next`), or the end-of-sequence token. Empty: nothing ends an answer.
    `in_parts`: the template reads content as a list of parts only.
    """

    tail: str
    closing: str
    opens_next: bool = False
    in_parts: bool = False


def shared_size(one: str, other: str) -> int:
    """Characters that both texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class AddedTokens:
    """The tokens that a tokenizer takes as they stand wherever they are in a text, special ones and others; but white
    space, which some have tokens for (Gemma), marks nothing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if str(token)}
        self.ids = {**added, **{token: int(_id_of(tokenizer, token)) for token in tokenizer.all_special_tokens}}
        longest_first = sorted((token for token in self.ids if token.strip(" \n\t▁")), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def split(self, text: str) -> list[str]:
        """The text between added tokens."""
        return self._pattern.split(text)

    def within(self, text: str) -> list[tuple[int, str]]:
        """Every added token of `text` and where it begins."""
        return [(match.start(), match[0]) for match in self._pattern.finditer(text)]

    def at(self, text: str, start: int) -> str:
        """The added token that stands at `start`, or nothing."""
        match = self._pattern.match(text, start)
        return match[0] if match else ""

    def common_prefix(self, one: str, other: str) -> str:
        """The longest common beginning that cuts no added token of either in two."""
        size = shared_size(one, other)
        for text in (one, other):
            cut = [start for start, token in self.within(text) if start < size < start + len(token)]
            size = min([size, *cut])
        return one[:size]


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index: Any = tokenizer.convert_tokens_to_ids(token)
    return index if isinstance(index, int) else -1


def end_of_turn(template: ChatTemplate, added: AddedTokens, turns: Sequence[Turn] = (_ASKED,), **given: Any) -> TurnEnd:
    """Find how `template` ends an answer after `turns`.

    Of what the template writes after an answer both when it is the last turn and when another follows, the end is the
    tokenizer's end-of-sequence token, else the last added token that does not also open turns. Where a template writes
    no such token, its own words decide: what it writes after a last answer, or what opens the next turn.

    Raises:
        InputError: the template refuses such a conversation, or leaves the answer out of it.
    """
    said: Turn = {"role": "assistant", "content": SENTINELS[0]}
    before, tail = _around(template.render([*turns, said], **given))
    _, follow = _around(template.render([*turns, said, _ASKED], **given))
    opened, unopened = (template.render(turns, answer_next=asks, **given) for asks in (True, False))
    answer_opener = opened[shared_size(opened, unopened) :]
    turn_opener = _shared_ending(before.partition(_ASKED["content"])[0], follow.partition(_ASKED["content"])[0])
    opens = [{token for _, token in added.within(text)} for text in (answer_opener, turn_opener)]
    return _decide(tail, follow, opens, added, str(template.tokenizer.eos_token or ""))


def _decide(tail: str, follow: str, opens: list[set[str]], added: AddedTokens, eos: str) -> TurnEnd:
    """`opens`: tokens that open an answer, and those that may open any turn."""
    both = [token for token in added.within(added.common_prefix(tail, follow)) if token[1] not in opens[0]]
    closers = [token for token in both if token[1] not in opens[1]] or both or added.within(tail)[:1]
    end = next((token for token in both or added.within(tail) if token[1] == eos), closers[-1] if closers else None)
    if end:
        return TurnEnd(tail, tail[: end[0] + len(end[1])])
    following = added.within(follow)
    if following and not follow[: following[0][0]].strip():
        return TurnEnd(tail, follow[: following[0][0] + len(following[0][1])], opens_next=True)
    return TurnEnd(tail, tail.rstrip() + eos if eos else "")


def _around(text: str) -> tuple[str, str]:
    """What stands before and after the answer."""
    before, said, after = text.rpartition(SENTINELS[0])
    if not said:
        raise InputError("the model's chat template leaves out or rewrites what the assistant says, whatever it is")
    return before, after


def _shared_ending(one: str, other: str) -> str:
    return one[len(one) - shared_size(one[::-1], other[::-1]) :]


@dataclass(frozen=True)
class _Ends:
    """What was asked of a tokenizer in a `state` (its template, its tokens): how its template ends an answer, and how a
    turn that calls tools."""

    state: tuple[Any, ...]
    added: AddedTokens
    answer: TurnEnd | None
    call: TurnEnd | None


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, _Ends] = WeakKeyDictionary()


def usual_end(tokenizer: PreTrainedTokenizerBase) -> tuple[AddedTokens, TurnEnd | None]:
    """The tokenizer's added tokens, and how its template ends a first answer: None where it has no template, or one
    that refuses a question and an answer."""
    ends = _ends(tokenizer)
    return ends.added, ends.answer


def call_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd | None:
    """How the template ends a turn that calls a tool, which may be otherwise than an answer (`<|call|>`,
    `<|observation|>`): generation stops there too, for the tool to be run. None where it writes no calls."""
    return _ends(tokenizer).call


def _ends(tokenizer: PreTrainedTokenizerBase) -> _Ends:
    """Found once for a tokenizer, again when its tokens or its template change."""
    state = (tokenizer.chat_template, len(tokenizer), tokenizer.special_tokens_map)
    known = _KNOWN.get(tokenizer)
    if known is None or known.state != state:
        added = AddedTokens(tokenizer)
        answer = _usual(tokenizer, added)
        call = _usual_call(ChatTemplate(tokenizer, in_parts=answer.in_parts), added, answer) if answer else None
        known = _KNOWN[tokenizer] = _Ends(state, added, answer, call)
    return known


def _usual(tokenizer: PreTrainedTokenizerBase, added: AddedTokens) -> TurnEnd | None:
    """With content as a text; where that is left out or refused, as a list of one part, which some templates want."""
    for in_parts in (False, True) if tokenizer.chat_template else ():
        with contextlib.suppress(InputError):
            end = end_of_turn(ChatTemplate(tokenizer, in_parts=in_parts), added)
            return replace(end, in_parts=in_parts)
    return None


def _usual_call(template: ChatTemplate, added: AddedTokens, answer: TurnEnd) -> TurnEnd | None:
    """With a call's arguments as an object; where that is refused, as JSON in a string."""
    for arguments in ({"a": "b"}, '{"a": "b"}'):
        with contextlib.suppress(InputError):
            return _end_of_call(template, added, answer, {"name": "Zq7", "arguments": arguments})
    return None


def _end_of_call(template: ChatTemplate, added: AddedTokens, answer: TurnEnd, function: Turn) -> TurnEnd | None:
    """As an answer ends, or with the last token that the template writes before what the tool says. A token that also
    stands between two calls of one turn ends a call, not the turn."""
    calls = [{"id": _CALL_ID, "type": "function", "function": function}]
    turns: list[Turn] = [_ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    alone = template.render(turns, tools=[_TOOL])
    if alone == template.render([_ASKED, {"role": "assistant", "content": ""}], tools=[_TOOL]):
        return None
    if answer.tail and alone.endswith(answer.tail):
        return answer
    told = template.render([*turns, _TOLD], tools=[_TOOL])
    if not told.startswith(alone):
        return None
    if answer.opens_next:
        opener = added.at(told, len(alone))
        return TurnEnd("", opener, opens_next=True) if opener else None
    place, last = (added.within(alone) or [(0, "")])[-1]
    with contextlib.suppress(InputError):  # a template that takes one call a turn
        twice = template.render([_ASKED, turns[1] | {"tool_calls": calls * 2}], tools=[_TOOL])
        if twice.count(last) > alone.count(last):
            return None
    return TurnEnd(alone[place:], last) if last and not alone[place + len(last) :].strip() else None


def template_of(
    tokenizer: PreTrainedTokenizerBase,
    day: date | None = None,
    ends: Any = None,
    options: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """The tokenizer's chat template on a day (None: today), given turns in the form that it reads. `ends`: a model's
    own list of tokens that generation stops at. `options`: variables for the template."""
    _, end = usual_end(tokenizer)
    in_parts = end is not None and end.in_parts
    return ChatTemplate(tokenizer, day or date.today(), in_parts=in_parts, ends=ends, options=options or {})


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template ends an answer with; None where there is none."""
    added, end = usual_end(tokenizer)
    return _last_id(end, added)


def _last_id(end: TurnEnd | None, added: AddedTokens) -> int | None:
    last = added.within(end.closing)[-1:] if end else []
    return added.ids[last[0][1]] if last else None


def end_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens that say nothing by themselves: those that begin, end and pad a text, and what ends an answer."""
    added, end = usual_end(tokenizer)
    closing = [token for _, token in added.within(end.closing)] if end else []
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    return tuple(dict.fromkeys(str(token) for token in (*closing, *named) if token))


def end_ids(tokenizer: PreTrainedTokenizerBase, also: Any = None) -> list[int]:
    """Every token that generation stops at: the end of sequence, what the chat template ends an answer or a call with,
    and `also`, a model's own list (`generation_config.eos_token_id`: a number, a list or None)."""
    stated = also if isinstance(also, list) else [also]
    ends = _ends(tokenizer)
    ids = [*stated, tokenizer.eos_token_id, *(_last_id(end, ends.added) for end in (ends.answer, ends.call))]
    return sorted({index for index in ids if isinstance(index, int) and index >= 0})
