"""Where rows come from: the entries of `data.train`, each a file, a pattern, a directory or a hub dataset → files."""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from entrenar.core.config import Section
from entrenar.core.documents import reason
from entrenar.core.errors import InputError, listing
from entrenar.files.data_file import is_data_file

_MOST = 100_000_000  # rows of one entry: a list of them has to fit into memory
_HUB_ID = re.compile(r"(?=.{3,96}$)\w[\w.-]*/\w[\w.-]*", re.ASCII)


class Source(Section):
    """One entry: where rows are, and how many of them are wanted.

    `rows`: so many; `weight`: a share of the rows that all entries with a weight have together, in proportion to theirs
    (data/mixing.py); neither: every row once. `split` and `revision` are of a hub dataset.
    """

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    rows: Annotated[int, Field(ge=1, le=_MOST)] | None = None
    split: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.weight is not None and self.rows is not None:
            raise ValueError(f"{self.path} has both a weight and a number of rows: keep one")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether every row is wanted once."""
        return self.weight is None and self.rows is None


def _entries(value: Any) -> Any:
    """A path, a mapping, or a list of those → a list of mappings."""
    entries = value if isinstance(value, list) else [value]
    wrong = [entry for entry in entries if not isinstance(entry, str | dict | Source)]
    if wrong or not entries:
        raise ValueError(
            "it names no rows: allowed are a path, a hub id, a mapping {path: …, weight: …}, or a list of those"
        )
    return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]


def _check_weights(sources: list[Source]) -> list[Source]:
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and not any(weights):
        raise ValueError("every weight is 0, so there is nothing to read: give one entry a weight above 0")
    without = [source.path for source in sources if source.is_whole]
    if weights and without:
        raise ValueError(f"{without[0]} has neither weight nor rows beside entries with a weight: give it one of them")
    return sources


def _written(sources: list[Source]) -> Any:
    """As a user writes it: a plain path is one string."""
    entries = [source.model_dump(exclude_none=True) for source in sources]
    short = [entry["path"] if len(entry) == 1 else entry for entry in entries]
    return short[0] if len(short) == 1 and isinstance(short[0], str) else short


Sources = Annotated[
    list[Source], BeforeValidator(_entries), AfterValidator(_check_weights), PlainSerializer(_written, return_type=Any)
]


@dataclass(frozen=True)
class SourceFiles:
    """The files of an entry, in the order they are read; `others`: what lies beside them in a directory, not read."""

    paths: list[Path]
    others: list[str] = field(default_factory=list)


def is_hub_id(path: str) -> bool:
    """Whether a path that is not there can name a hub dataset: `org/name`, and not as a data file is named."""
    return bool(_HUB_ID.fullmatch(path)) and not is_data_file(path)


def source_names(sources: Sequence[Source]) -> str:
    """How the entries are named in a sentence."""
    return listing([source.path for source in sources], 4)


def files_of(source: Source, split: str) -> SourceFiles:
    """The files of one entry. `split`: of a hub dataset, where the entry names none.

    Raises:
        InputError: a pattern that no file matches, a directory without a data file, a hub dataset out of reach or
            without that split.
    """
    path, kind = Path(source.path), _kind(source.path)
    if not kind and not glob.has_magic(source.path) and is_hub_id(source.path):
        from entrenar.data.hub_dataset import hub_files  # loads huggingface_hub

        return SourceFiles(hub_files(source.path, source.split or split, source.revision))
    if source.split or source.revision:
        raise InputError(f"{path} is no hub dataset (org/name), so it has no split or revision: leave them out")
    if kind == "directory":
        return _in_directory(path)
    if kind or not glob.has_magic(source.path):
        return SourceFiles([path])  # a file that is not there is told by its reader
    matches = sorted(name for name in glob.glob(source.path, recursive=True) if _kind(name) != "directory")  # noqa: PTH207 - absolute ones too
    if not matches:
        raise InputError(f"no file matches {source.path}: check the pattern")
    return SourceFiles([Path(name) for name in matches])


def _in_directory(path: Path) -> SourceFiles:
    """Its data files, not those of directories in it; names that begin with a dot are passed over."""
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"directory {path} cannot be read: {reason(error)}") from None
    files = [entry for entry in entries if not entry.is_dir() and is_data_file(entry.name)]
    others = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries if entry not in files]
    if not files:
        beside = f" (it has {listing(others)})" if others else ""
        raise InputError(
            f"directory {path} has no data file in it{beside}: name the files, as {path}/**/*.parquet or one by one"
        )
    return SourceFiles(files, others)


def _kind(path: str) -> str:
    """ "directory", "file" for whatever else is there, or "" for nothing."""
    try:
        return "directory" if Path(path).is_dir() else "file" if Path(path).exists() else ""
    except (OSError, ValueError):
        return "file"  # something is there that may not be looked at, or the name is none: its reader says which
