"""Evaluate: perplexity on a file, exact match where rows have answers, KL against another model."""

from dataclasses import dataclass, field
from pathlib import Path

from entrenar.core.errors import InputError
from entrenar.data.dataset import TooLong, load_evaluation
from entrenar.data.feed import read_feed
from entrenar.data.row_options import AS_THEY_ARE, RowOptions
from entrenar.data.rows import Rejected
from entrenar.evaluation.exact_match import Answer, exact_match
from entrenar.evaluation.perplexity import kl_divergence, perplexity
from entrenar.models.head import padding_id
from entrenar.opening.adapted import open_model


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Loss in nats per target token over `tokens` of them; `exact_match` a share of the `answers`, one for each of the
    `rows` that ends with an answer (None: of none, or not asked for); `kl` in nats per token. `date`: the day that the
    chat template was told, None if it asks for none. `rejected` and `truncated`: rows left out and cut."""

    rows: int
    tokens: int
    loss: float
    perplexity: float
    exact_match: float | None
    kl: float | None
    answers: list[Answer]
    date: str | None = None
    rejected: list[Rejected] = field(default_factory=list)
    truncated: int = 0


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
    dtype: str = "auto",
    too_long: TooLong = "error",
    date: str | None = None,
) -> Evaluation:
    """Measure `model` (with `adapter`) on the rows of `data`.

    Args:
        against: another model with the same vocabulary; `kl` is then KL(against ‖ model). match: answer every
            conversation that ends with an answer greedily and compare. dtype: as for `load`. max_length: tokens; a
            longer row is an error, cut, or left out, by `too_long`. date: the day that a chat template is told, as
            2026-11-30; None: data.dataset.EVALUATION_DAY, on every day.
    """
    loaded, tokenizer = open_model(model, adapter, quantize, dtype)
    remedy = "raise --max-length (max_length), or choose truncate or drop with --too-long (too_long)"
    ends = getattr(loaded.generation_config, "eos_token_id", None)
    feed = read_feed(Path(adapter)) if adapter else None
    options = RowOptions(template=feed.template_options) if feed else AS_THEY_ARE
    read = load_evaluation(data, tokenizer, max_length, too_long, date, remedy, ends, options)
    dataset = read.dataset
    if not len(dataset):
        raise InputError(f"{data} leaves no row to evaluate on: check its rows and max_length {max_length}")
    pad = padding_id(loaded, tokenizer.pad_token_id)
    measured = perplexity(loaded, dataset, batch_size, pad)
    answers = exact_match(loaded, tokenizer, dataset, batch_size=4 * batch_size) if match else []
    kl = None
    if against is not None:
        other, _ = open_model(against, dtype=dtype)
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
        date=read.date,
        rejected=read.rejected,
        truncated=read.truncated,
    )
