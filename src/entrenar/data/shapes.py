"""The shapes that rows come in, each brought into one `Row`: a conversation, plain text, or token ids.

`messages` (OpenAI's, or ShareGPT's `from` and `value` under that name); `conversations` (ShareGPT); `prompt` and
`completion`; `instruction` (with `input`, `history`) and `output` (alpaca); `input_ids` (with `labels` or
`completion_mask`); `text`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from entrenar.data.key_names import is_given
from entrenar.data.spoken import is_silent
from entrenar.data.turns import Message, read_turns

_NOT_TRAINED = -100  # what a label says of a token that is not trained, as PyTorch's cross-entropy ignores it


@dataclass(frozen=True)
class Row:
    """One usable row: a conversation (`messages`), plain `text`, or token `ids`; and the file and line it stood on.

    `tools` and `options` (a row's `chat_template_kwargs`) are for the chat template. `untrained`: assistant turns that
    the row says not to train on, `marked`: those that it says to train on, by their index. `mask`: which of the ids
    are trained.
    """

    line: int
    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()
    file: str = field(default="", compare=False)


def list_of(value: Any) -> Any:
    """A list, also as JSON in a string; nothing is an empty one."""
    if isinstance(value, str) and value.strip():
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value if is_given(value) else []


def _from_messages(row: dict[str, Any], line: int) -> Row | str:
    return _conversation(row["messages"], "messages", line)


def _from_conversations(row: dict[str, Any], line: int) -> Row | str:
    return _conversation(row["conversations"], "conversations", line)


def _conversation(turns: Any, name: str, line: int) -> Row | str:
    read = read_turns(turns, name)
    if isinstance(read, str):
        return read
    return Row(line, read.messages, untrained=read.untrained, marked=read.marked)


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
    marked = frozenset(size + index for index in second.marked)
    return Row(line, first.messages + second.messages, untrained=frozenset(aside), marked=marked)


def _from_alpaca(row: dict[str, Any], line: int) -> Row | str:
    context = row["input"] if is_given(row.get("input")) else ""
    if not isinstance(context, str):
        return "an input that is not text"
    instruction = row["instruction"]
    joined = f"{instruction}\n\n{context}" if context and isinstance(instruction, str) else instruction
    history = list_of(row.get("history"))
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


def _from_ids(row: dict[str, Any], line: int) -> Row | str:
    """Tokens as they are: all trained, or as `labels` or a mask says."""
    ids = row["input_ids"]
    if not _are_counts(ids) or not ids:
        return "input_ids that are not a list of token ids"
    labels, masks = row.get("labels"), [name for name in _MASKS if is_given(row.get(name))]
    if len(masks) + is_given(labels) > 1:
        return f"a row with labels and {' and '.join(masks)}: keep one"
    mask = row[masks[0]] if masks else [1] * len(ids)
    if is_given(labels):
        if not isinstance(labels, list) or len(labels) != len(ids):
            return "labels that are not one for each of the input_ids"
        if any(label not in (_NOT_TRAINED, token) for label, token in zip(labels, ids, strict=True)):
            return f"labels that are neither the input_ids nor {_NOT_TRAINED}: they are not shifted, as in transformers"
        mask = [int(label != _NOT_TRAINED) for label in labels]
    if not _are_counts(mask) or len(mask) != len(ids) or max(mask) > 1:
        return f"{masks[0]} that is not a 0 or 1 for each of the input_ids"
    attended = row.get("attention_mask")
    if is_given(attended) and attended != [1] * len(ids):
        return "an attention_mask that is not 1 for each of the input_ids: remove padding from the row"
    if not any(mask[1:]):
        return "no token of input_ids is trained, so there is nothing to train on"
    return Row(line, ids=tuple(ids), mask=tuple(map(bool, mask)))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


SYSTEM = ("system", "system_prompt", "system_message")
BESIDE = ("tools", "functions", "chat_template_kwargs", *SYSTEM)  # what may stand beside a conversation
_MASKS = ("completion_mask", "assistant_masks")
Converter = Callable[[dict[str, Any], int], Row | str]
# Shape → the keys that make it, those that may stand beside them, and what reads it. The first that fits is taken.
SHAPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Converter]] = {
    "messages": (("messages",), BESIDE, _from_messages),
    "ShareGPT": (("conversations",), BESIDE, _from_conversations),
    "prompt/completion": (("prompt", "completion"), BESIDE, _from_prompt),
    "alpaca": (("instruction", "output"), ("input", "history", *BESIDE), _from_alpaca),
    "text": (("text",), (), _from_text),
    "input_ids": (("input_ids",), ("labels", "attention_mask", *_MASKS), _from_ids),
}
