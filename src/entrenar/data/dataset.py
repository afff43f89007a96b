"""From files to encoded examples: length policy, validation split, rejected rows, a hash of it all."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.data.encode import Example, encode
from entrenar.data.rows import Rejected, Row, read_rows

TooLong = Literal["error", "truncate", "drop"]


@dataclass(frozen=True)
class Dataset:
    """Encoded rows of one split."""

    examples: list[Example]
    rows: list[Row] = field(repr=False)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.examples)


@dataclass(frozen=True)
class PreparedData:
    """What training needs: both splits, and what was said and left out on the way."""

    train: Dataset
    validation: Dataset | None
    shape: str
    rejected: list[Rejected]
    truncated: int
    fingerprint: str


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
) -> PreparedData:
    """Read, split and encode the data.

    Args:
        validation: a file of its own; or `validation_fraction` of the training file, chosen by a seeded hash of each
            row, so that a row keeps its side whatever else the file holds.
        max_length: tokens; a longer row is an error, cut, or left out, by `too_long`.

    Raises:
        InputError: see `read_rows`; a row that is too long under `error`; a split without rows to train on.
    """
    file = read_rows(train)
    tally = _Tally(rejected=list(file.rejected))
    fraction = validation_fraction if validation is None else 0.0
    held_out = [row for row in file.rows if _chosen(row, seed, fraction)]
    kept = [row for row in file.rows if not _chosen(row, seed, fraction)]
    training = _encode_rows(kept, train, tokenizer, max_length, too_long, tally)
    if validation is not None:
        other = read_rows(validation)
        tally.rejected += other.rejected
        held_out, source = other.rows, validation
    else:
        source = train
    evaluating = _encode_rows(held_out, source, tokenizer, max_length, too_long, tally) if held_out else None
    for path, dataset, purpose in ((train, training, "train"), (source, evaluating, "validate")):
        if dataset is not None and not len(dataset):
            raise InputError(f"{path} leaves no row to {purpose} on: check max_length and the rejected rows")
    fingerprint = _fingerprint(training, evaluating)
    return PreparedData(training, evaluating, file.shape, tally.rejected, tally.truncated, fingerprint)


def load_dataset(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Read and encode one file for evaluation; every row must fit."""
    return _encode_rows(read_rows(path).rows, path, tokenizer, max_length, "error", _Tally())


def _encode_rows(
    rows: Iterable[Row],
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: TooLong,
    tally: _Tally,
) -> Dataset:
    examples, kept = [], []
    rejected: list[Rejected] = []
    for row in rows:
        example = _fit(_encode_row(row, path, tokenizer), path, max_length, too_long, tally)
        if example is None:
            rejected.append(Rejected(str(path), row.line, f"longer than max_length {max_length}, dropped"))
        elif not any(example.trained[1:]):
            rejected.append(Rejected(str(path), row.line, "no token to train on within max_length"))
        else:
            examples.append(example)
            kept.append(row)
    tally.rejected += rejected
    return Dataset(examples, kept)


def _encode_row(row: Row, path: Path, tokenizer: PreTrainedTokenizerBase) -> Example:
    try:
        return encode(row, tokenizer)
    except InputError as error:
        raise InputError(f"{path}:{row.line}: {error}") from None


def _fit(example: Example, path: Path, max_length: int, too_long: TooLong, tally: _Tally) -> Example | None:
    if len(example) <= max_length:
        return example
    if too_long == "error":
        raise InputError(
            f"{path}:{example.line}: the row has {len(example)} tokens, data.max_length is {max_length}: raise it, "
            "or set data.too_long to truncate or drop"
        )
    if too_long == "drop":
        return None
    tally.truncated += 1
    return Example(example.line, example.ids[:max_length], example.trained[:max_length])


def _chosen(row: Row, seed: int, fraction: float) -> bool:
    """Whether a row is held out: a hash of its content and the seed, as a number in [0, 1), is below the fraction."""
    digest = hashlib.sha256(f"{seed}|{row.text}|{row.messages!r}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _fingerprint(*datasets: Dataset | None) -> str:
    """A hash of every token and mask bit, in order: the identity of the data a run was trained on."""
    hasher = hashlib.sha256()
    for dataset in datasets:
        for example in dataset.examples if dataset else []:
            hasher.update(repr((example.ids, example.trained)).encode())
        hasher.update(b"|")
    return hasher.hexdigest()
