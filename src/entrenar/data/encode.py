"""A row → token ids and the mask of trained tokens, with the tokenizer's own chat template.

Trained are the assistant's tokens and the token that ends the turn, nothing else. The text is rendered once and
tokenized once, exactly as it is served; where an assistant turn begins and ends is found by rendering the
conversation's prefixes: `render(turns before, generation prompt)` ends where the answer begins.
"""

from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.data.rows import Message, Row

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Token ids (T,) and, for each, whether it is trained on; `line` of the source file."""

    line: int
    ids: list[int]
    trained: list[bool]

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)


def encode(row: Row, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenize a row and mark its trained tokens.

    Raises:
        InputError: a conversation without a chat template, or a template that does not fit it.
    """
    if row.text:
        ids = tokenizer(row.text, return_attention_mask=False)["input_ids"]
        ids = _end_of_text(_one_bos(list(ids), tokenizer), tokenizer)
        return Example(row.line, ids, [i != tokenizer.bos_token_id or n > 0 for n, i in enumerate(ids)])
    messages = list(row.messages)
    text = render(messages, tokenizer)
    spans = _assistant_spans(messages, text, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    trained = [any(start <= a and b <= end for start, end in spans) and b > a for a, b in offsets]
    _cut_after_end_of_turn(ids, trained, tokenizer)
    return Example(row.line, ids, trained)


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, answer_next: bool = False) -> str:
    """The conversation as the model's own template writes it; `answer_next` opens an assistant turn at the end."""
    if not tokenizer.chat_template:
        raise InputError(
            "this model's tokenizer has no chat template, so it cannot be trained on conversations: use rows with "
            "`text`, or an instruct model"
        )
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(f"the model's chat template refuses this conversation: {error}") from None
    return text


def _assistant_spans(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Character ranges of the assistant turns in the rendered text, each with all that closes the turn."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], tokenizer, answer_next=True)
        after = text if index + 1 == len(messages) else render(messages[: index + 1], tokenizer)
        if not (text.startswith(before) and text.startswith(after) and len(after) > len(before)):
            raise InputError(
                "the model's chat template writes earlier turns differently once later ones follow, so the assistant's "
                "tokens cannot be told apart: train on rows that end at the first assistant turn"
            )
        spans.append((len(before), len(after)))
    return spans


def _cut_after_end_of_turn(ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase) -> None:
    """Within each run of trained tokens, what follows the last special token (a newline, usually) is not trained."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for start, end in _runs(trained):
        last = next((i for i in range(end - 1, start - 1, -1) if ids[i] in special), end - 1)
        trained[last + 1 : end] = [False] * (end - 1 - last)


def _runs(flags: list[bool]) -> list[Span]:
    edges = [i for i in range(len(flags) + 1) if (i < len(flags) and flags[i]) != (i > 0 and flags[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Plain text that already begins with the BOS written out does not get the tokenizer's own before it."""
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids


def _end_of_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Plain text ends with the end-of-sequence token, so that a model trained on it learns to stop."""
    end: Any = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
