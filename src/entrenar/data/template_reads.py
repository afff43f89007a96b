"""Whether a chat template writes all that a row says; what it would drop without a word is refused by its name.

Asked by changing one thing and rendering again: what changes nothing is not read.
"""

from typing import Any

from entrenar.core.errors import InputError
from entrenar.data.answers import Conversation
from entrenar.data.template import REASONING_KEYS, Turn

_SHORT = 12  # characters of a text that may stand in a conversation by chance


def check_read(talk: Conversation, whole: str) -> None:
    """Tools, calls and reasoning must change what is written (`whole`).

    Raises:
        InputError: the template does not read one of them, which is named.
    """
    if talk.tools and talk.template.render(talk.turns, options=talk.options) == whole:
        raise InputError("the model's chat template does not read tools: use a model with tools, or remove the key")
    for index, turn in enumerate(talk.turns):
        for key in ("tool_calls", *REASONING_KEYS):
            if turn.get(key) and not _reads(talk, index, key, whole):
                raise InputError(
                    f"the model's chat template does not write {key} of turn {index + 1}: put it into the content as "
                    f"the model writes it, use another model, or remove the key"
                )
        _check_calls(talk, index, whole)


def check_context(talk: Conversation) -> None:
    """What the others say must be written, from its first word to its last.

    Raises:
        InputError: the template leaves a turn out, or a part of one.
    """
    whole = talk.render(talk.turns)
    for index, turn in enumerate(talk.turns):
        if turn["role"] != "assistant" and not _is_written(talk, index, whole):
            raise InputError(
                f"the model's chat template leaves out what turn {index + 1} ({turn['role']}) says, or a part of it: "
                f"write it into a turn that the template writes, use another model, or remove it"
            )


def _reads(talk: Conversation, index: int, key: str, whole: str) -> bool:
    """Whether the template writes `key` of a turn when it is the last: of earlier ones it may leave thoughts out."""
    turns = list(talk.turns[: index + 1])
    if key in REASONING_KEYS and index + 1 < len(talk.turns):
        whole = talk.render(turns)
    else:
        turns = list(talk.turns)
    turns[index] = {name: value for name, value in turns[index].items() if name != key}
    return _changes(talk, turns, whole)


def _check_calls(talk: Conversation, index: int, whole: str) -> None:
    """Every one of several calls must be written, and every call's numbers."""
    calls = talk.turns[index].get("tool_calls") or []
    for place, call in enumerate(calls):
        others = [calls[:place] + calls[place + 1 :]] if len(calls) > 1 else []
        function = call.get("function", call)
        changed = _other_numbers(function.get("arguments"))
        if changed != function.get("arguments"):
            other = {**function, "arguments": changed}
            others.append([*calls[:place], {**call, "function": other} if "function" in call else other,
                           *calls[place + 1 :]])  # fmt: skip
        if not all(_changes(talk, _with(talk, index, tool_calls=given), whole) for given in others):
            raise InputError(
                f"the model's chat template does not write call {place + 1} of turn {index + 1} with all its arguments:"
                f" use another model, or write the call into the content"
            )


def _other_numbers(value: Any) -> Any:
    """The value with another number in place of each, and the other truth."""
    if isinstance(value, dict):
        return {key: _other_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_other_numbers(item) for item in value]
    if isinstance(value, bool):
        return not value
    return 1 - value if isinstance(value, int | float) else value


def _is_written(talk: Conversation, index: int, whole: str) -> bool:
    """Whether a turn's content stands in the conversation; where not to the letter, whether both its ends count."""
    said = talk.turns[index].get("content") or ""
    if not said.strip() or (len(said.strip()) >= _SHORT and said.strip() in whole):
        return True
    return all(_changes(talk, _with(talk, index, content=other), whole) for other in ("Zq" + said, said + "Zq"))


def _with(talk: Conversation, index: int, **changed: Any) -> list[Turn]:
    turns = list(talk.turns)
    turns[index] = {**turns[index], **changed}
    return turns


def _changes(talk: Conversation, turns: list[Turn], whole: str) -> bool:
    try:
        return talk.render(turns) != whole
    except InputError:  # it cannot do without
        return True
