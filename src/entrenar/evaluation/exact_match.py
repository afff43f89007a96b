"""Exact match: the share of rows whose greedy answer is the expected text, white space at its ends aside.

Expected is what the model was trained to write: the decoded tokens of the row's answer, with all that its chat template
makes of it (an empty thought before it, say). Asked is with the very tokens that stand before the answer in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.data.dataset import Dataset
from entrenar.data.encode import Example
from entrenar.evaluation.generate import generate_ids, spoken_text


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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, batch_size: int = 32
) -> list[Answer]:
    """Answer every conversation that ends with an answer greedily; an answer may be twice the longest expected one's
    tokens long. Rows of plain text, those that end with another turn, and those whose answer is not trained or was cut
    have none to match and are left out."""
    asked = [
        ((row.messages[-2].get("content") or "") if len(row.messages) > 1 else "", example)
        for row, example in zip(dataset.rows, dataset.examples, strict=True)
        if example.answer is not None
    ]
    if not asked:
        return []
    examples = [example for _, example in asked]
    longest = max(len(_answer(example)) for example in examples)
    prompts = [example.ids[: example.answer[0]] for example in examples if example.answer]
    texts = generate_ids(model, tokenizer, prompts, max_new_tokens=2 * longest, batch_size=batch_size)
    return [
        Answer(question, spoken_text(_answer(example), model, tokenizer), text)
        for (question, example), text in zip(asked, texts, strict=True)
    ]


def _answer(example: Example) -> Sequence[int]:
    start, end = example.answer or (0, 0)
    return example.ids[start:end]
