"""A row → token ids and the mask of trained tokens, with the tokenizer's own chat template.

Trained are the assistant's tokens and the token that ends the turn, nothing else. Prompt and answer are tokenized as
they are when the model is served: the ids before an answer are those of the prompt by itself, so no token lies across
the border, and the answer's tokens are those that spell the answer from there on. Where an earlier answer was served
another text than the last one's holds, it is a branch (data/tree.py). No offsets are asked for: a post-processor may
have cut them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.data.answers import Answer, find_answers
from entrenar.data.context import check_context
from entrenar.data.conversation import converse
from entrenar.data.row_options import TrainOn
from entrenar.data.rows import Row
from entrenar.data.spoken import says_something
from entrenar.data.template import ChatTemplate, Turn
from entrenar.data.tokens import all_tokens, tokens
from entrenar.data.tree import Path, as_tree
from entrenar.data.turn_end import end_ids, end_texts, template_of

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Token ids (T,) and, for each, whether it is trained on; `line` of the source file.

    `answer`: first and one past the last token of the answer that ends the conversation, if one does: what stands
    before it is the prompt that is served. `branches`: where earlier answers begin whose prompts are not in the last
    one's, see data/tree.py.
    """

    line: int
    ids: list[int]
    trained: list[bool]
    answer: Span | None = None
    branches: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def runs(self) -> list[tuple[int, int, int]]:
        """Trunk and branches: first token, one past the last, and the position of the first."""
        ends = [*(start for start, _ in self.branches), len(self)]
        begins = [(0, 0), *self.branches]
        return [(start, end, first) for (start, first), end in zip(begins, ends, strict=True)]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: the trunk, or a branch with what leads to it."""
        return max(first + end - start for start, end, first in self.runs())

    def expanded(self) -> list["Example"]:
        """Every branch with what leads to it as a row of its own, and the trunk: for models that know no trees. A
        shared token stays trained in the trunk alone."""
        trunk, *branches = self.runs()
        rows = [
            Example(self.line, self.ids[:first] + self.ids[start:end], [False] * first + self.trained[start:end])
            for start, end, first in branches
        ]
        return [*rows, Example(self.line, self.ids[: trunk[1]], self.trained[: trunk[1]], self.answer)]

    def cut(self, most: int) -> "Example":
        """Without the tokens at positions from `most` on."""
        ids, trained, branches = list[int](), list[bool](), list[tuple[int, int]]()
        for start, end, first in self.runs():
            stop = min(end, start + most - first)
            if stop - start > (start > 0):  # more than the token that a branch repeats
                branches += [(len(ids), first)] if start else []
                ids += self.ids[start:stop]
                trained += self.trained[start:stop]
        answer = self.answer if self.answer and self.answer[1] <= most else None
        return Example(self.line, ids, trained, answer, tuple(branches))


def encode(
    row: Row, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None = None, train_on: TrainOn = "all"
) -> Example:
    """Tokenize a row and mark its trained tokens; `template`: the tokenizer's, on a fixed day (default: today).
    `train_on`: see data/row_options.py.

    Of every trained turn three things are checked: its decoded tokens hold what the row says, the ids before it are
    those of the prompt that a server sends, its last id is one that generation stops at.

    Raises:
        InputError: a conversation without a chat template, a template that does not fit it, something that the row says
            and the template leaves out.
    """
    if row.text:
        ids = tokenizer(row.text, return_attention_mask=False)["input_ids"]
        ids = _end_of_text(_one_bos(list(ids), tokenizer), tokenizer)
        return Example(row.line, ids, [i != tokenizer.bos_token_id or n > 0 for n, i in enumerate(ids)])
    if row.ids:
        return Example(row.line, list(row.ids), list(row.mask))
    template = template or template_of(tokenizer)
    silent = end_texts(tokenizer)
    wanted = _wanted(row, train_on, silent)
    talk = converse(row, template, wanted)
    answers, rest = find_answers(talk, wanted)
    check_context(talk, wanted)
    texts = [text for answer in answers for text in (answer.prompt, answer.prompt + answer.text)]
    ids = all_tokens(texts, tokenizer)
    pairs = zip(answers, ids[::2], ids[1::2], strict=True)
    paths = [_path(answer, prompt, whole, tokenizer, template.ends) for answer, prompt, whole in pairs]
    span = (paths[-1].start, len(paths[-1].ids)) if wanted[-1] == len(row.messages) - 1 else None
    tree = as_tree(paths, _after_end(rest, answers[-1], tokenizer))
    return Example(row.line, tree.ids, tree.trained, span, tree.branches)


def _wanted(row: Row, train_on: TrainOn, silent: Sequence[str]) -> list[int]:
    """The turns that are trained, by index."""
    answers = [i for i, turn in enumerate(row.messages) if _is_answer(turn, silent)]
    chosen = {"all": set(answers), "last": set(answers[-1:]), "marked": row.marked}[train_on]
    wanted = [i for i in answers if i in chosen and i not in row.untrained]
    if not wanted:
        which = {"all": "", "last": " (data.train_on: last)", "marked": " (data.train_on: marked)"}[train_on]
        raise InputError(f"no assistant turn with text is trained{which}, so there is nothing to train on")
    return wanted


def _is_answer(turn: Turn, ends: Sequence[str]) -> bool:
    return turn["role"] == "assistant" and says_something(turn, ends)


def _path(
    answer: Answer, prompt: list[int], whole: list[int], tokenizer: PreTrainedTokenizerBase, ends: Any = None
) -> Path:
    """The tokens of the prompt and of the answer; `whole`: of both as one text. `ends`: the model's own ends of
    generation."""
    answer_ids = _own_tokens(answer, prompt, whole, tokenizer)
    if answer_ids[-1] not in end_ids(tokenizer, ends):
        raise InputError(f"the answer ends with {answer.end!r}, which generation does not stop at")
    spoken = _bare(_text(answer_ids, tokenizer))
    for piece in answer.said:
        if _bare(_normal(piece, tokenizer)) not in spoken:
            raise InputError(
                f"the tokenizer does not spell what the assistant says: {piece[:40]!r} is not in its tokens"
            )
    return Path(prompt + answer_ids, len(prompt))


def _own_tokens(answer: Answer, prompt: list[int], whole: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The answer's tokens after those of its prompt.

    Where prompt and answer make a token together, the answer is tokenized behind something that never joins with it (a
    tokenizer may write a space before the first word of a text); the right one spells the same text as the whole does.
    """
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    spelled = _text(whole, tokenizer)
    for anchor in (answer.end, "", "\n", ".", "a"):
        before, both = tokens(anchor, tokenizer), tokens(anchor + answer.text, tokenizer)
        answer_ids = both[len(before) :]
        if both[: len(before)] == before and _text(prompt + answer_ids, tokenizer) == spelled:
            return answer_ids
    raise InputError("prompt and answer make a token together, and the answer cannot be spelled without it")


def _after_end(rest: str, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of what stands after an answer; its end is a token of its own whatever follows."""
    if not rest:
        return []
    end, both = tokens(answer.end, tokenizer), tokens(answer.end + rest, tokenizer)
    return both[len(end) :]


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _bare(text: str) -> str:
    """Without white space, which decoders treat in their own ways (▁ is SentencePiece's)."""
    return "".join(text.replace("▁", " ").split())


def _normal(piece: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A piece as the tokenizer's normalizer leaves it."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    normal = backend.normalizer if backend is not None else None
    return str(normal.normalize_str(piece)) if normal else piece


def _one_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Plain text that already begins with the BOS written out does not get the tokenizer's own before it."""
    return ids[1:] if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id else ids


def _end_of_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Plain text ends with the end-of-sequence token, so that a model trained on it learns to stop."""
    end: Any = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
