"""One turn of a conversation as rows give it → as chat templates take it, or what is wrong with it.

Nothing that has a meaning is dropped: a key is passed on to the template, honoured here (`weight`, `train`), or
refused by name. A key at null is not there.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from entrenar.core.errors import listing
from entrenar.data.key_names import is_given, says_what_is_trained, switches

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's names of who speaks.
_SPEAKERS = {
    "system": "system", "developer": "developer", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "bot": "assistant",
    "model": "assistant", "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "tool": "tool",
    "tool_response": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")
_READ = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking"}
_HONOURED = {*_READ, "weight", "train"}
# Keys that say something about what is shown, in a way that is not honoured.
_REFUSED = ("prefix", "images", "image", "videos", "video", "audio", "audios", "refusal")
# Keys that say by false or 0 that a turn is not trained.
_TRAINED = ("loss", "loss_weight", "loss_mask", "train_on", "trainable", "training", "trained", "label", "labels")
# Keys of a part of content that change nothing of its text.
_OF_PARTS = {"type", "text", "cache_control"}


@dataclass(frozen=True)
class Turns:
    """The turns of a row, which assistant turns it says not to train on, and which it says to train on."""

    messages: tuple[Message, ...]
    untrained: frozenset[int]
    marked: frozenset[int]


def read_turns(given: Any, name: str = "messages") -> Turns | str:
    """The turns of the list `given`, which the row calls `name`; or what is wrong with one."""
    if not isinstance(given, list) or not given:
        return f"{name} is not a list of turns"
    messages, untrained, marked = [], set[int](), set[int]()
    for index, turn in enumerate(given):
        read = _read_turn(turn)
        if isinstance(read, str):
            return read
        message, is_trained = read
        messages.append(message)
        if is_trained is not None:
            (marked if is_trained else untrained).add(index)
    return Turns(tuple(messages), frozenset(untrained), frozenset(marked))


def _read_turn(turn: Any) -> tuple[Message, bool | None] | str:
    bad = f"a turn that is not {{role: {' | '.join(ROLES)}, content: text}}"
    given = _in_todays_words(turn)
    if isinstance(given, str):
        return given
    if given.get("role") not in ROLES:
        return bad
    refused = [key for key, value in given.items() if _is_refused(key, value) and not _is_so(given, key)]
    if refused:
        return (
            f"a turn with {listing(refused)}, which is not supported: leave it out or set it to null; weight: 0 or "
            "train: false keep a turn from being trained on"
        )
    problem = _calls_problem(given) or _reasoning_problem(given)
    if problem:
        return problem
    if "content" in given:
        content = _text_of(given["content"])
        if content is None:
            return _content_problem(given["content"], bad)
        given["content"] = content
    elif not given.get("tool_calls"):
        return bad
    return _trained(given)


def _in_todays_words(turn: Any) -> Message | str:
    """A turn without what is null, in OpenAI's words of today: ShareGPT's `from` and `value`, the role `function` and
    `function_call` of old are written anew."""
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    if "from" in given and "value" in given and not {"role", "content"} & set(given):
        speaker, value = given.pop("from"), given.pop("value")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            return f"a turn from {speaker!r}: allowed are {', '.join(_SPEAKERS)}"
        said = {"tool_calls": _call_of(value)} if speaker in _CALLS else {"content": value}
        given = {"role": _SPEAKERS[speaker], **said, **given}
        if given.get("tool_calls") == "":
            return f"a turn from {speaker} whose value is not JSON of {{name: text, arguments: object}}"
    if given.get("role") == "function":
        given["role"] = "tool"
    if is_given(given.get("function_call")):
        if is_given(given.get("tool_calls")):
            return "a turn with function_call and tool_calls: keep one"
        given["tool_calls"] = [{"type": "function", "function": given["function_call"]}]
    given.pop("function_call", None)
    return given


def _call_of(value: Any) -> Any:
    """The calls that ShareGPT's text of one, or of a list, holds; an empty text if it holds none."""
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return ""
    calls = read if isinstance(read, list) else [read]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return ""
    return [{"type": "function", "function": call} for call in calls]


def _is_so(given: Message, key: str) -> bool:
    """Whether a key only says that what never is trained, as the turns of others, is not."""
    return given["role"] != "assistant" and key in _TRAINED and given[key] in (False, 0)


def _is_refused(key: str, value: Any) -> bool:
    """Whether a key says, or may say, something that nobody would hear."""
    if key in _HONOURED or not is_given(value):
        return False
    within = [name for name, item in value.items() if is_given(item)] if isinstance(value, dict) else []
    return key in _REFUSED or any(says_what_is_trained(name) for name in (key, *within)) or switches(key, value)


def _trained(given: Message) -> tuple[Message, bool | None] | str:
    """Without `weight` and `train`, and what they say: None where an assistant's turn has neither."""
    says_nothing = not {"weight", "train"} & set(given)
    weight, train = given.pop("weight", 1), given.pop("train", given["role"] == "assistant")
    if type(weight) not in (bool, int, float) or weight not in (0, 1):
        return f"a turn with weight {weight!r}: allowed are 0 and 1"
    if not isinstance(train, bool):
        return f"a turn with train {train!r}: allowed are true and false"
    if train and given["role"] != "assistant":
        return f"train: true in a turn of {given['role']}: only what the assistant says is trained on"
    message = {key: given[key] for key in ("role", "content") if key in given} | given
    is_silent = given["role"] != "assistant" or says_nothing
    return message, None if is_silent else bool(weight) and train


def _text_of(content: Any) -> str | None:
    """A text, or parts that are all text, joined; None if it is neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [part["text"] for part in content if _is_text(part) and isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else None


def _is_text(part: Any) -> bool:
    others = {key for key, value in part.items() if is_given(value)} if isinstance(part, dict) else {"?"}
    return others <= _OF_PARTS and part.get("type", "text") == "text"


def _content_problem(content: Any, bad: str) -> str:
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return bad
    kinds = sorted({_kind(part) for part in content if not _is_text(part)})
    return (
        f"a turn whose content has parts that are not text ({listing(kinds)}): only text is trained on"
        if kinds
        else bad
    )


def _kind(part: dict[str, Any]) -> str:
    """What a part is, or which of its keys make it more than text."""
    kind = str(part.get("type", "a part without type"))
    others = sorted(str(key) for key, value in part.items() if key not in _OF_PARTS and is_given(value))
    return f"text with {', '.join(others)}" if kind == "text" and others else kind


def _calls_problem(given: Message) -> str:
    calls = given.get("tool_calls")
    if not calls:
        given.pop("tool_calls", None)
        return ""
    if given["role"] != "assistant":
        return f"tool_calls in a turn of {given['role']}: only the assistant calls tools"
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        return "tool_calls that are not a list of {function: {name: text, arguments: object or JSON text}}"
    return ""


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments", {}), str | dict)
    )


def _reasoning_problem(given: Message) -> str:
    keys = [key for key in ("reasoning_content", "reasoning", "thinking") if given.get(key)]
    if not all(isinstance(given[key], str) for key in keys):
        return f"{listing(keys)} that is not text"
    if len({given[key] for key in keys}) > 1:
        return f"a turn with {listing(keys)}, which differ: keep one"
    return f"{listing(keys)} in a turn of {given['role']}" if keys and given["role"] != "assistant" else ""


def unused_keys(messages: Iterable[Message]) -> list[str]:
    """Keys of turns whose meaning is not known here; a template may read them."""
    return sorted({key for message in messages for key in message if key not in _READ})
