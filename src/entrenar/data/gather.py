"""The rows of all entries of `data.train`, read, encoded and mixed into one set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from entrenar.core.errors import listing
from entrenar.data.encoded import Dataset, Encoder
from entrenar.data.mixing import choose, row_counts
from entrenar.data.rows import RowFile, read_rows
from entrenar.data.sources import Source, files_of


@dataclass(frozen=True)
class SourceRows:
    """What one entry gave: `rows` of the `usable` ones in its `files`; `others`: files beside them, not read."""

    path: str
    shapes: list[str]
    files: int
    usable: int
    rows: int
    others: list[str] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether it is one file with each of its rows once."""
        return self.files == 1 and self.rows == self.usable

    def sentence(self) -> str:
        """Which rows, and how many of how many."""
        if not self.files:
            return f"{self.path}: not read, its weight is 0"
        many = f" in {self.files} files" if self.files > 1 else ""
        return f"{self.path}: {listing(self.shapes)} rows{many}, {self.rows} of {self.usable}"


@dataclass(frozen=True)
class Gathered:
    """One set of rows, and where they are from. `files`: all that were read."""

    dataset: Dataset
    sources: list[SourceRows]
    files: list[RowFile]


def told(sources: Sequence[SourceRows]) -> str:
    """What the entries gave, one after the other."""
    return "; ".join(source.sentence() for source in sources)


def as_sources(given: Path | str | Sequence[Source]) -> list[Source]:
    """One path as the entry that it is."""
    return [Source(path=str(given))] if isinstance(given, Path | str) else list(given)


def gather(sources: Sequence[Source], encoder: Encoder, seed: int, split: str) -> Gathered:
    """Read and encode the files of every source, and take from each as many rows as data/mixing.py says: usable ones,
    those that can be trained on. Entry by entry, file by file.

    Args:
        split: of a hub dataset, where its entry names none; it also sets the choices of several sets apart.

    Raises:
        InputError: see `files_of`, `read_rows`, `Encoder.encoded` and `row_counts`.
    """
    parts = [_read(source, encoder, split) for source in sources]
    counts = row_counts(sources, [len(part.dataset) for part in parts])
    dataset, gave = Dataset([], []), list[SourceRows]()
    for index, (part, count) in enumerate(zip(parts, counts, strict=True)):
        chosen = choose(len(part.dataset), count, seed, f"{split}|{index}")
        dataset.examples.extend(part.dataset.examples[row] for row in chosen)
        dataset.rows.extend(part.dataset.rows[row] for row in chosen)
        shapes = list(dict.fromkeys(file.shape for file in part.files))
        gave.append(SourceRows(sources[index].path, shapes, len(part.files), len(part.dataset), count, part.others))
    return Gathered(dataset, gave, [file for part in parts for file in part.files])


@dataclass(frozen=True)
class _Part:
    dataset: Dataset
    files: list[RowFile]
    others: list[str]


def _read(source: Source, encoder: Encoder, split: str) -> _Part:
    dataset, files = Dataset([], []), list[RowFile]()
    if source.weight == 0:
        return _Part(dataset, files, [])
    there = files_of(source, split)
    for path in there.paths:
        files.append(read_rows(path, encoder.options.columns))
        part = encoder.encoded(files[-1])
        dataset.examples.extend(part.examples)
        dataset.rows.extend(part.rows)
    return _Part(dataset, files, there.others)
