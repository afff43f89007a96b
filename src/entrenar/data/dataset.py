"""From files to encoded examples: length policy, validation split, rejected rows, a hash of it all."""

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.data.encoded import Dataset, Encoder, Limit, TooLong
from entrenar.data.gather import SourceRows, as_sources, gather
from entrenar.data.row_options import AS_THEY_ARE, RowOptions
from entrenar.data.rows import Rejected, Row, RowFile
from entrenar.data.sources import Source, source_names
from entrenar.data.spoken import says_something
from entrenar.data.template import ChatTemplate
from entrenar.data.turn_end import end_texts, template_of
from entrenar.data.turns import unused_keys

__all__ = ["Dataset", "EvaluationData", "PreparedData", "TooLong", "load_dataset", "load_evaluation", "prepare"]

# The day that chat templates are told when a model is measured: a fixed one, so that the numbers stay what they are.
EVALUATION_DAY = "2026-01-01"


@dataclass(frozen=True)
class PreparedData:
    """What training needs: both splits, and what was said and left out on the way.

    `date`: the day that the chat template wrote into the rows, None if it asks for none. `unused`: columns that nothing
    reads. `silent_turns`: assistant turns without a word, which are context and not trained. `sources`: the entries of
    the training set before a share of it is held out; `validation_sources`: of a validation set of its own.
    """

    train: Dataset
    validation: Dataset | None
    sources: list[SourceRows]
    rejected: list[Rejected]
    truncated: int
    fingerprint: str
    date: str | None = None
    unused: list[str] = field(default_factory=list)
    silent_turns: int = 0
    validation_sources: list[SourceRows] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationData:
    """Rows to measure on, what was left out of it, and the day that the chat template wrote (None: none)."""

    dataset: Dataset
    rejected: list[Rejected]
    truncated: int
    date: str | None


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    train: Path | Sequence[Source],
    validation: Path | Sequence[Source] | None = None,
    *,
    validation_fraction: float = 0.0,
    max_length: int = 1024,
    too_long: TooLong = "error",
    seed: int = 0,
    date: str | None = None,
    ends: Any = None,
    options: RowOptions = AS_THEY_ARE,
) -> PreparedData:
    """Read, split and encode the data.

    Args:
        train: a file, or entries (data/sources.py) that are mixed by `seed`. validation: the same for a set of its own;
            or `validation_fraction` of the training set, chosen by a seeded hash of each row, so that a row keeps its
            side whatever else the set holds, and however often.
        max_length: tokens; a longer row is an error, cut, or left out, by `too_long`.
        date: the day that a chat template is told, as 2026-11-30; None: today.
        ends: the model's own ends of generation (`generation_config.eos_token_id`: a number, a list or None).
        options: columns, what is trained, variables for the template.

    Raises:
        InputError: see `read_rows`; a row that is too long under `error`; rows that the template refuses, more than 1%
            of a file with those that cannot be read; a split without rows to train on.
    """
    template = template_of(tokenizer, read_date(date) if date else None, ends, options.template)
    limit = Limit(
        max_length, too_long, f"data.max_length is {max_length}: raise it, or set data.too_long to truncate or drop"
    )
    encoder = Encoder(template, limit, options)
    sources = as_sources(train)
    gathered = gather(sources, encoder, seed, "train")
    files, validation_sources = gathered.files, list[SourceRows]()
    if validation is not None:
        others = as_sources(validation)
        beside = gather(others, encoder, seed, "validation")
        training, evaluating, validation_sources = gathered.dataset, beside.dataset, beside.sources
        files += beside.files
    else:
        others = sources
        training, evaluating = _split(gathered.dataset, seed, validation_fraction)
    for entries, dataset, purpose in ((sources, training, "train"), (others, evaluating, "validate")):
        if dataset is not None and not len(dataset):
            raise InputError(
                f"{source_names(entries)} leaves no row to {purpose} on: check max_length and the rejected rows"
            )
    silent = end_texts(tokenizer)
    return PreparedData(
        training,
        evaluating,
        gathered.sources,
        encoder.tally.rejected,
        encoder.tally.truncated,
        _fingerprint(training, evaluating),
        template.day.isoformat() if template.reads_clock else None,
        _unused(files, template),
        sum(_silent_turns(row, silent) for dataset in (training, evaluating) if dataset for row in dataset.rows),
        validation_sources,
    )


def load_dataset(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Read and encode one file; every row must fit. See `load_evaluation`."""
    return load_evaluation(path, tokenizer, max_length).dataset


def load_evaluation(
    source: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: TooLong = "error",
    date: str | None = None,
    remedy: str = "",
    ends: Any = None,
    options: RowOptions = AS_THEY_ARE,
) -> EvaluationData:
    """Read and encode a file, or what else an entry of `data.train` may be (of a hub dataset: the split test), for
    evaluation. `date`: see `prepare`; None: a fixed day (`EVALUATION_DAY`), so that
    what is measured does not change with the calendar. `remedy`: what to do about a row that is too long.
    `ends`, `options`: see `prepare`."""
    template = template_of(tokenizer, read_date(date or EVALUATION_DAY), ends, options.template)
    encoder = Encoder(
        template, Limit(max_length, too_long, f"the limit is {max_length}: {remedy or 'raise it'}"), options
    )
    dataset = gather(as_sources(source), encoder, 0, "test").dataset
    day = template.day.isoformat() if template.reads_clock else None
    return EvaluationData(dataset, encoder.tally.rejected, encoder.tally.truncated, day)


def read_date(text: str) -> datetime.date:
    """2026-11-30 → a date; InputError for anything else."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise InputError(f"the date {text!r} is none: write it as 2026-11-30") from None


def _split(data: Dataset, seed: int, fraction: float) -> tuple[Dataset, Dataset | None]:
    """The rows that train, and those held out: None where no row was chosen."""
    chosen = [_chosen(row, seed, fraction) for row in data.rows]
    sides = [
        Dataset(
            [example for example, is_held_out in zip(data.examples, chosen, strict=True) if is_held_out is side],
            [row for row, is_held_out in zip(data.rows, chosen, strict=True) if is_held_out is side],
        )
        for side in (False, True)
    ]
    return sides[0], sides[1] if any(chosen) else None


def _unused(files: list[RowFile], template: ChatTemplate) -> list[str]:
    """Columns that nothing reads, and keys of turns that the template does not mention."""
    columns = [name for file in files for name in file.unused]
    keys = [key for file in files for row in file.rows for key in unused_keys(row.messages)]
    return list(dict.fromkeys(columns + [f"messages.{key}" for key in dict.fromkeys(keys) if not template.reads(key)]))


def _silent_turns(row: Row, ends: Sequence[str]) -> int:
    return sum(turn["role"] == "assistant" and not says_something(turn, ends) for turn in row.messages)


def _chosen(row: Row, seed: int, fraction: float) -> bool:
    """Whether a row is held out: a hash of its content and the seed, as a number in [0, 1), is below the fraction."""
    beside = "".join(f"|{part!r}" for part in (row.tools, row.ids) if part)
    digest = hashlib.sha256(f"{seed}|{row.text}|{row.messages!r}{beside}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _fingerprint(*datasets: Dataset | None) -> str:
    """A hash of every token and mask bit, in order: the identity of the data a run was trained on."""
    hasher = hashlib.sha256()
    for dataset in datasets:
        for example in dataset.examples if dataset else []:
            hasher.update(repr((example.ids, example.trained, *example.branches)).encode())
        hasher.update(b"|")
    return hasher.hexdigest()
