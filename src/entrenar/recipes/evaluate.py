"""Evaluate: perplexity on a file, exact match where rows have answers, KL against another model."""

from dataclasses import dataclass
from pathlib import Path

from entrenar.core.errors import InputError
from entrenar.data.dataset import load_dataset
from entrenar.evaluation.exact_match import Answer, exact_match
from entrenar.evaluation.perplexity import kl_divergence, perplexity
from entrenar.recipes.open_model import open_model


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss in nats per target token over `tokens` of them; `exact_match` a share of `rows`; `kl` in nats per token."""

    rows: int
    tokens: int
    loss: float
    perplexity: float
    exact_match: float | None
    kl: float | None
    answers: list[Answer]


def evaluate(
    model: str,
    data: str | Path,
    *,
    adapter: str | None = None,
    against: str | None = None,
    quantize: str | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    match: bool = True,
) -> Evaluation:
    """Measure `model` (with `adapter`) on the rows of `data`.

    Args:
        against: another model with the same vocabulary; `kl` is then KL(against ‖ model). match: answer every
            conversation greedily and compare.
    """
    loaded, tokenizer = open_model(model, adapter, quantize)
    dataset = load_dataset(Path(data), tokenizer, max_length)
    if not len(dataset):
        raise InputError(f"{data} leaves no row to evaluate on: check its rows and max_length {max_length}")
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    measured = perplexity(loaded, dataset, batch_size, pad)
    answers: list[Answer] = []
    if match and all(row.messages for row in dataset.rows):
        answers = exact_match(loaded, tokenizer, dataset.rows, batch_size=4 * batch_size)
    kl = None
    if against is not None:
        other, _ = open_model(against)
        sizes = (other.config.vocab_size, loaded.config.vocab_size)
        if sizes[0] != sizes[1]:
            raise InputError(f"{against} has {sizes[0]} tokens, {model} has {sizes[1]}: KL needs one vocabulary")
        kl = kl_divergence(loaded, other, dataset, batch_size, pad)
    return Evaluation(
        rows=len(dataset),
        tokens=measured.tokens,
        loss=measured.loss,
        perplexity=measured.perplexity,
        exact_match=sum(answer.is_exact for answer in answers) / len(answers) if answers else None,
        kl=kl,
        answers=answers,
    )
