"""Where the assistant's turns stand in a rendered conversation: what leads to each, what it says, what ends it.

Nothing is looked up by a model's name. A conversation is rendered up to a turn with the generation prompt, which is
what a server would send, and up to and with the turn; both must begin the whole. What a row says must be in what is
trained.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entrenar.core.errors import InputError
from entrenar.data.template import REASONING_KEYS, ChatTemplate, Turn
from entrenar.data.turn_end import SENTINELS, AddedTokens, TurnEnd, end_of_turn, shared_size, usual_end

_THOUGHT = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")


@dataclass(frozen=True)
class Answer:
    """A trained turn: the `prompt` that a server would send, and its `text` with the token that ends it (`end`).

    `said`: pieces of the row that the text holds, in order.
    """

    prompt: str
    text: str
    end: str
    said: list[str]


@dataclass(frozen=True)
class Conversation:
    """A row's turns before its template, with all that the template is given."""

    turns: Sequence[Turn]
    template: ChatTemplate = field(repr=False)
    tools: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def render(self, turns: Sequence[Turn], answer_next: bool = False) -> str:
        """Some turns as text."""
        return self.template.render(turns, answer_next=answer_next, tools=self.tools, options=self.options)


def says_something(turn: Turn) -> bool:
    """Whether there is anything in an assistant's turn to train on."""
    spoken = [turn.get("content"), *(turn.get(key) for key in REASONING_KEYS)]
    return bool(turn.get("tool_calls")) or any(isinstance(text, str) and text.strip() for text in spoken)


def find_answers(talk: Conversation, trained: Sequence[int]) -> tuple[list[Answer], str]:
    """The answers at the turns `trained`, in order, and the text that stands after the last of them.

    Raises:
        InputError: the template leaves out what a turn says, writes it otherwise once others follow, or ends it with
            nothing; the sentence says which.
    """
    whole = talk.render(talk.turns)
    answers, rest = [], ""
    for index in trained:
        answer, end = _find(talk, index, whole, is_only=len(trained) == 1)
        answers.append(answer)
        rest = whole[end:]
    return answers, rest


def _find(talk: Conversation, index: int, whole: str, is_only: bool) -> tuple[Answer, int]:
    before, turn = talk.turns[:index], talk.turns[index]
    is_last = index + 1 == len(talk.turns)
    alone = whole if is_last else talk.render([*before, turn])
    prompt = talk.render(before, answer_next=True)
    start = _start(talk, index, prompt, alone, is_only)
    added, end = _end(talk, index, alone)
    stop = len(alone) - len(end.tail)
    if not is_last and not whole.startswith(alone[:stop]):
        raise InputError(
            "the model's chat template writes earlier turns differently once later ones follow, so the assistant's "
            "tokens cannot be told apart: train on rows that end at the first assistant turn"
        )
    said = list(_said(turn, added))
    _check_said(said, alone[start:stop], added, ends_with_content=not turn.get("tool_calls"))
    closing = _closing(end, added, whole, stop, is_last)
    last = added.within(closing)[-1][1] if added.within(closing) else closing
    spoken = Answer(prompt, alone[start:stop] + closing, last, [piece for _, piece in said])
    return spoken, len(whole) if is_last and not end.tail.startswith(closing) else stop + len(closing)


def _start(talk: Conversation, index: int, prompt: str, alone: str, is_only: bool) -> int:
    """Where the answer begins in `alone`. A prompt that opens more than the turn itself does (a thought) stands before
    the answer all the same: it is what the model is given."""
    if alone.startswith(prompt):
        return len(prompt)
    added, _ = usual_end(talk.template.tokenizer)
    shared = len(added.common_prefix(prompt, alone))
    if prompt[shared:].strip():
        header = _header(talk, index)
        begins = len(header) if prompt.startswith(header) and alone.startswith(header) else -1
    else:
        begins = shared
    if begins >= 0 and is_only:
        return begins
    if begins >= 0:
        raise InputError(
            f"the model's chat template asks for an answer with {_ending(prompt)!r} and writes the turn without all of "
            "that, so a second answer would follow another text than the one served: train on rows of one answer"
        )
    if shared >= shared_size(prompt, talk.render(talk.turns[:index]) if index else ""):
        raise InputError(
            f"the model's chat template asks for an answer with {_ending(prompt)!r}, and this answer begins "
            f"otherwise, with "
            f"{alone[shared : shared + 40]!r}: write it as the model would go on, or use another template"
        )
    raise InputError(
        "the model's chat template writes earlier turns differently once the answer follows, so what leads to it is "
        f"not in the row (it is asked for with {_ending(prompt)!r}): use turns that the template keeps as they are"
    )


def _header(talk: Conversation, index: int) -> str:
    """What stands before the text of an answer at a turn, whatever it says."""
    before = list(talk.turns[:index])
    first, second = (talk.render([*before, {"role": "assistant", "content": word}]) for word in SENTINELS)
    return first[: shared_size(first, second)]


def _ending(text: str) -> str:
    return text if len(text) <= 40 else "…" + text[-40:]


def _end(talk: Conversation, index: int, alone: str) -> tuple[AddedTokens, TurnEnd]:
    added, end = usual_end(talk.template.tokenizer)
    if end is None or not alone.endswith(end.tail):
        given = {"tools": talk.tools, "options": talk.options}
        end = end_of_turn(talk.template, added, talk.turns[:index], **given)
    if not alone.endswith(end.tail):
        raise InputError(
            f"the model's chat template ends this turn otherwise than an answer, with {_ending(alone)!r} where an "
            f"answer ends with {end.tail!r}, so what ends it cannot be told"
        )
    if not end.closing:
        raise InputError(
            "the model's chat template ends an answer with no token, and the tokenizer has no end-of-sequence token: "
            "nothing would teach the model to stop"
        )
    return added, end


def _closing(end: TurnEnd, added: AddedTokens, whole: str, stop: int, is_last: bool) -> str:
    """What ends the turn that stops at `stop`."""
    if is_last or whole.startswith(end.closing, stop):
        return end.closing
    if end.opens_next and added.at(whole, stop):
        return added.at(whole, stop)
    raise InputError(
        f"the model's chat template ends an answer with {end.closing!r} only when nothing follows, and here with "
        f"{whole[stop : stop + 20]!r}, which generation does not stop at: train on rows that end at the first "
        f"assistant turn"
    )


def _check_said(said: list[tuple[str, str]], text: str, added: AddedTokens, ends_with_content: bool) -> None:
    """Every piece of what the row says must be in the answer, one after the other; what is said last ends it."""
    place = 0
    for key, piece in said:
        start = 0 if key == "tool_calls" else place
        found = max(text.find(form, start) for form in (_forms(piece) if key == "tool_calls" else [piece]))
        place = found + len(piece)
        is_cut = found >= 0 and ends_with_content and (key, piece) == said[-1]
        if found < 0 or (is_cut and not _pieces(text, added)[-1].endswith(piece)):
            shown = piece if len(piece) <= 40 else piece[:40] + "…"
            raise InputError(
                f"the model's chat template leaves out or rewrites what the assistant says: {shown!r} of its {key} is "
                f"not in the answer it writes, {_ending(text)!r}; mend the row, or use a template that keeps it"
            )


def _forms(piece: str) -> list[str]:
    """A piece as it stands, and as a JSON string holds it."""
    return list(dict.fromkeys([piece, json.dumps(piece)[1:-1], json.dumps(piece, ensure_ascii=False)[1:-1]]))


def _said(turn: Turn, added: AddedTokens) -> Iterator[tuple[str, str]]:
    """What a turn says, as (key, piece): the texts between tags that templates treat on their own, and what is
    called."""
    reasoning = next((key for key in REASONING_KEYS if turn.get(key)), None)
    if reasoning:
        yield from ((reasoning, piece) for piece in _pieces(turn[reasoning], added))
    yield from (("content", piece) for piece in _pieces(turn.get("content") or "", added))
    for call in turn.get("tool_calls") or ():
        function = call.get("function", call)
        yield "tool_calls", str(function.get("name", ""))
        yield from (("tool_calls", leaf) for leaf in _leaves(function.get("arguments")))


def _pieces(text: str, added: AddedTokens) -> list[str]:
    parts = [part for whole in added.split(text) for part in _THOUGHT.split(whole)]
    return [part.strip() for part in parts if part.strip()]


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) and value.strip():
        yield value
