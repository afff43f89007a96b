"""From files to encoded examples: length policy, validation split, rejected rows, a hash of it all."""

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.data.encode import Example
from entrenar.data.parallel import encode_all
from entrenar.data.row_options import AS_THEY_ARE, RowOptions, TrainOn
from entrenar.data.rows import Rejected, Row, RowFile, check_share, read_rows
from entrenar.data.spoken import says_something
from entrenar.data.template import ChatTemplate
from entrenar.data.turn_end import end_texts, template_of
from entrenar.data.turns import unused_keys

TooLong = Literal["error", "truncate", "drop"]
# The day that chat templates are told when a model is measured: a fixed one, so that the numbers stay what they are.
EVALUATION_DAY = "2026-01-01"


@dataclass(frozen=True)
class Dataset:
    """Encoded rows of one split."""

    examples: list[Example]
    rows: list[Row] = field(repr=False)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.examples)

    @property
    def has_trees(self) -> bool:
        """Whether any row has branches (data/tree.py)."""
        return any(example.branches for example in self.examples)

    def expanded(self) -> "Dataset":
        """Every branch as a row of its own."""
        pairs = [
            (part, row) for example, row in zip(self.examples, self.rows, strict=True) for part in example.expanded()
        ]
        return Dataset([part for part, _ in pairs], [row for _, row in pairs])


@dataclass(frozen=True)
class PreparedData:
    """What training needs: both splits, and what was said and left out on the way.

    `date`: the day that the chat template wrote into the rows, None if it asks for none. `unused`: columns that nothing
    reads. `silent_turns`: assistant turns without a word, which are context and not trained.
    """

    train: Dataset
    validation: Dataset | None
    shape: str
    rejected: list[Rejected]
    truncated: int
    fingerprint: str
    date: str | None = None
    unused: list[str] = field(default_factory=list)
    silent_turns: int = 0


@dataclass(frozen=True)
class EvaluationData:
    """A file to measure on, what was left out of it, and the day that the chat template wrote (None: none)."""

    dataset: Dataset
    rejected: list[Rejected]
    truncated: int
    date: str | None


@dataclass(frozen=True)
class _Limit:
    """The longest row in tokens, what becomes of longer ones, and how the user names both."""

    max_length: int
    too_long: TooLong
    remedy: str


@dataclass
class _Tally:
    rejected: list[Rejected] = field(default_factory=list)
    truncated: int = 0


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    train: Path,
    validation: Path | None = None,
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
        validation: a file of its own; or `validation_fraction` of the training file, chosen by a seeded hash of each
            row, so that a row keeps its side whatever else the file holds.
        max_length: tokens; a longer row is an error, cut, or left out, by `too_long`.
        date: the day that a chat template is told, as 2026-11-30; None: today.
        ends: the model's own ends of generation (`generation_config.eos_token_id`: a number, a list or None).
        options: columns, what is trained, variables for the template.

    Raises:
        InputError: see `read_rows`; a row that is too long under `error`; rows that the template refuses, more than 1%
            of a file with those that cannot be read; a split without rows to train on.
    """
    template, tally = template_of(tokenizer, read_date(date) if date else None, ends, options.template), _Tally()
    silent = end_texts(tokenizer)
    limit = _Limit(
        max_length, too_long, f"data.max_length is {max_length}: raise it, or set data.too_long to truncate or drop"
    )
    file = read_rows(train, options.columns)
    training = _encode_file(file, template, limit, tally, options.train_on)
    files = [file]
    if validation is not None:
        files.append(read_rows(validation, options.columns))
        evaluating, source = _encode_file(files[1], template, limit, tally, options.train_on), validation
    else:
        training, evaluating = _split(training, seed, validation_fraction)
        source = train
    for path, dataset, purpose in ((train, training, "train"), (source, evaluating, "validate")):
        if dataset is not None and not len(dataset):
            raise InputError(f"{path} leaves no row to {purpose} on: check max_length and the rejected rows")
    return PreparedData(
        training,
        evaluating,
        file.shape,
        tally.rejected,
        tally.truncated,
        _fingerprint(training, evaluating),
        template.day.isoformat() if template.reads_clock else None,
        _unused(files, template),
        sum(_silent_turns(row, silent) for dataset in (training, evaluating) if dataset for row in dataset.rows),
    )


def load_dataset(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Read and encode one file; every row must fit. See `load_evaluation`."""
    return load_evaluation(path, tokenizer, max_length).dataset


def load_evaluation(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: TooLong = "error",
    date: str | None = None,
    remedy: str = "",
    ends: Any = None,
    options: RowOptions = AS_THEY_ARE,
) -> EvaluationData:
    """Read and encode one file for evaluation. `date`: see `prepare`; None: a fixed day (`EVALUATION_DAY`), so that
    what is measured does not change with the calendar. `remedy`: what to do about a row that is too long.
    `ends`, `options`: see `prepare`."""
    template, tally = template_of(tokenizer, read_date(date or EVALUATION_DAY), ends, options.template), _Tally()
    limit = _Limit(max_length, too_long, f"the limit is {max_length}: {remedy or 'raise it'}")
    dataset = _encode_file(read_rows(path, options.columns), template, limit, tally, options.train_on)
    day = template.day.isoformat() if template.reads_clock else None
    return EvaluationData(dataset, tally.rejected, tally.truncated, day)


def read_date(text: str) -> datetime.date:
    """2026-11-30 → a date; InputError for anything else."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise InputError(f"the date {text!r} is none: write it as 2026-11-30") from None


def _encode_file(
    file: RowFile, template: ChatTemplate, limit: _Limit, tally: _Tally, train_on: TrainOn = "all"
) -> Dataset:
    """Every row of a file that can be trained on. Rows that the template refuses are bad rows as those that cannot be
    read: up to 1% of the file."""
    bad, left_out = list(file.rejected), list[Rejected]()
    examples, rows = list[Example](), list[Row]()
    for row, result in zip(file.rows, encode_all(file.rows, template, train_on), strict=True):
        if isinstance(result, InputError):
            bad.append(Rejected(str(file.path), row.line, str(result)))
            continue
        example = _fit(result, file.path, limit, tally)
        if example is None:
            left_out.append(Rejected(str(file.path), row.line, f"longer than max_length {limit.max_length}, dropped"))
        elif not any(example.trained[1:]):
            left_out.append(Rejected(str(file.path), row.line, "no token to train on within max_length"))
        else:
            examples.append(example)
            rows.append(row)
    check_share(bad, file.total)
    tally.rejected += sorted(bad + left_out, key=lambda row: row.line)
    return Dataset(examples, rows)


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


def _fit(example: Example, path: Path, limit: _Limit, tally: _Tally) -> Example | None:
    if example.longest <= limit.max_length:
        return example
    if limit.too_long == "error":
        raise InputError(f"{path}:{example.line}: the row has {example.longest} tokens, {limit.remedy}")
    if limit.too_long == "drop":
        return None
    tally.truncated += 1
    return example.cut(limit.max_length)


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
