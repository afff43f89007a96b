"""Exact match: the share of rows whose greedy answer is the expected text, white space at its ends aside."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.data.rows import Row
from entrenar.evaluation.generate import generate


@dataclass(frozen=True)
class Answer:
    """One row's last question, the expected answer and the model's."""

    prompt: str
    expected: str
    actual: str

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the expected one."""
        return self.actual.strip() == self.expected.strip()


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 32
) -> list[Answer]:
    """Answer every row's last assistant turn greedily; an answer may be twice the expected one's tokens long.

    Raises:
        InputError: rows that do not end with an assistant turn.
    """
    conversations = [_question_and_answer(row) for row in rows]
    longest = max(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for _, answer in conversations)
    questions = [question for question, _ in conversations]
    texts = generate(model, tokenizer, questions, max_new_tokens=2 * longest, batch_size=batch_size)
    return [
        Answer(question[-1]["content"], expected, text)
        for (question, expected), text in zip(conversations, texts, strict=True)
    ]


def _question_and_answer(row: Row) -> tuple[list[dict[str, str]], str]:
    if len(row.messages) < 2 or row.messages[-1]["role"] != "assistant":
        raise InputError(f"line {row.line} does not end with an assistant turn, so there is no answer to match")
    return list(row.messages[:-1]), row.messages[-1]["content"]
