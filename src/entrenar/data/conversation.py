"""A row as its chat template takes it, and whether the template writes all that the row gives it."""

import copy
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from entrenar.core.errors import InputError
from entrenar.data.rows import Row
from entrenar.data.template import REASONING_KEYS, ChatTemplate, Turn

_AHEAD = 2**22  # characters, about, that are rendered in one go


@dataclass(frozen=True)
class Conversation:
    """A row's turns before its template, with all that the template is given; `whole`: the text that it makes;
    `asked`: what was rendered ahead, see `ask`."""

    turns: Sequence[Turn]
    template: ChatTemplate = field(repr=False)
    tools: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    whole: str = ""
    asked: dict[tuple[int, bool], str | InputError] = field(default_factory=dict, repr=False)

    def ask(self, prefixes: Sequence[tuple[int, bool]]) -> None:
        """Render beginnings of the turns ahead, in one go: (number of turns, whether an answer comes next)."""
        size = sum(len(turn.get("content") or "") for turn in self.turns)
        step = max(1, _AHEAD // (size + 1))
        for start in range(0, len(prefixes), step):
            some = prefixes[start : start + step]
            texts = self.template.render_prefixes(self.turns, some, tools=self.tools, options=self.options)
            self.asked.update(zip(some, texts, strict=True))

    def render(self, turns: Sequence[Turn], answer_next: bool = False) -> str:
        """Some turns as text."""
        text = self.asked.get((len(turns), answer_next))
        if text is not None and all(map(operator.is_, turns, self.turns)):
            if isinstance(text, InputError):
                raise text
            return text
        return self.template.render(turns, answer_next=answer_next, tools=self.tools, options=self.options)


def converse(row: Row, template: ChatTemplate, trained: Sequence[int]) -> Conversation:
    """The row as its template takes it; what is to be known of its turns `trained` is rendered ahead.

    Raises:
        InputError: the template refuses the row, or does not read its tools, calls, reasoning or options.
    """
    for options, name in ((row.options, "chat_template_kwargs"), (template.options, "data.template")):
        for key in options:
            if not template.reads(key, row.tools):
                raise InputError(f"the model's chat template does not read {key} of {name}: leave it out")
    reads_developer = template.reads("developer", row.tools)
    turns = [
        {**turn, "role": "system"} if turn["role"] == "developer" and not reads_developer else turn
        for turn in row.messages
    ]
    given = Conversation(turns, template, row.tools, row.options)
    counts = dict.fromkeys([len(turns), *(index + 1 for index in trained)])
    ahead = [*((count, False) for count in counts), *((index, True) for index in trained)]
    if any(_functions(turns)):
        talk, whole = _choose_arguments(given)
        talk.ask(ahead)
    else:
        given.ask(ahead)
        talk, whole = given, given.render(turns)
    _check_read(talk, whole)
    return replace(talk, whole=whole)


def _choose_arguments(given: Conversation) -> tuple[Conversation, str]:
    """The conversation with its calls' arguments as JSON in strings or as objects, as the template writes them well.

    Both are in use: OpenAI's rows hold strings, servers read them into objects. As given, where that is what the
    template makes of an object too; a string that the template would put into a string once more becomes an object.
    """
    ways = [given, *(_with_arguments(given, change) for change in (_as_object, _as_string))]
    ways = [way for place, way in enumerate(ways) if all(way.turns != other.turns for other in ways[:place])]
    rendered, problems = list[tuple[Conversation, str]](), list[InputError]()
    for way in ways:
        try:
            rendered.append((way, way.render(way.turns)))
        except InputError as error:
            problems.append(error)
        if way is given and rendered and not _has_strings(given.turns):
            break  # objects that it takes
    if not rendered:
        raise problems[0]
    if len(rendered) > 1 and not _is_well_written(given, rendered[0][1], rendered[1][1]):
        return rendered[1]
    return rendered[0]


def _has_strings(turns: Sequence[Turn]) -> bool:
    return any(isinstance(function.get("arguments"), str) for function in _functions(turns))


def _is_well_written(given: Conversation, as_given: str, as_object: str) -> bool:
    """Whether a template writes arguments that are JSON in a string as such: it holds each as it stands, not within a
    string, and has no form of its own for objects but Python's."""
    for function in _functions(given.turns):
        text = function.get("arguments")
        if not isinstance(text, str) or _as_object(text) == text:
            continue
        parsed, twice = _as_object(text), json.dumps(text)
        if text not in as_given or (twice in as_given and twice not in as_object):
            return False
        forms = [json.dumps(parsed), json.dumps(parsed, ensure_ascii=False), str(parsed), text]
        if not any(bare_text(form) in bare_text(as_object) for form in forms):
            return False
    return True


def _with_arguments(talk: Conversation, change: Any) -> Conversation:
    turns = copy.deepcopy(list(talk.turns))
    for function in _functions(turns):
        if "arguments" in function:
            function["arguments"] = change(function["arguments"])
    return replace(talk, turns=turns, asked={})


def _functions(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [call.get("function", call) for turn in turns for call in turn.get("tool_calls") or ()]


def _as_object(arguments: Any) -> Any:
    """JSON in a string as what it holds; a call in the model's own words stays."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _as_string(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _check_read(talk: Conversation, whole: str) -> None:
    """Tools, calls and reasoning must change what is written; a template that knows none would drop them."""
    if talk.tools and talk.template.render(talk.turns, options=talk.options) == whole:
        raise InputError("the model's chat template does not read tools: use a model with tools, or remove the key")
    for index, turn in enumerate(talk.turns):
        for key in ("tool_calls", *REASONING_KEYS):
            if turn.get(key) and not _reads(talk, index, key, whole):
                raise InputError(
                    f"the model's chat template does not write {key} of turn {index + 1}: put it into the content as "
                    f"the model writes it, use another model, or remove the key"
                )


def _reads(talk: Conversation, index: int, key: str, whole: str) -> bool:
    """Whether the template writes `key` of a turn when it is the last: of earlier ones it may leave thoughts out."""
    turns = list(talk.turns[: index + 1])
    if key in REASONING_KEYS and index + 1 < len(talk.turns):
        whole = talk.render(turns)
    else:
        turns = list(talk.turns)
    turns[index] = {name: value for name, value in turns[index].items() if name != key}
    try:
        return talk.render(turns) != whole
    except InputError:  # it cannot do without
        return True


def bare_text(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())
