"""From the rows of a file to examples: the length policy, and the rows that are left out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from entrenar.core.errors import InputError
from entrenar.data.encode import Example
from entrenar.data.parallel import encode_all
from entrenar.data.row_options import RowOptions
from entrenar.data.rows import Rejected, Row, RowFile, check_share
from entrenar.data.template import ChatTemplate

TooLong = Literal["error", "truncate", "drop"]


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
class Limit:
    """The longest row in tokens, what becomes of longer ones, and how the user names both."""

    max_length: int
    too_long: TooLong
    remedy: str


@dataclass
class Tally:
    """What was left out and cut on the way."""

    rejected: list[Rejected] = field(default_factory=list)
    truncated: int = 0


@dataclass(frozen=True)
class Encoder:
    """How rows become examples; `tally` is added to."""

    template: ChatTemplate
    limit: Limit
    options: RowOptions
    tally: Tally = field(default_factory=Tally)

    def encoded(self, file: RowFile) -> Dataset:
        """Every row of a file that can be trained on. Rows that the template refuses are bad rows as those that cannot
        be read: up to 1% of the file."""
        bad, left_out = list(file.rejected), list[Rejected]()
        examples, rows = list[Example](), list[Row]()
        results = encode_all(file.rows, self.template, self.options.train_on)
        for row, result in zip(file.rows, results, strict=True):
            if isinstance(result, InputError):
                bad.append(Rejected(str(file.path), row.line, str(result)))
                continue
            example = self._fit(result, file.path)
            if example is None:
                left_out.append(
                    Rejected(str(file.path), row.line, f"longer than max_length {self.limit.max_length}, dropped")
                )
            elif not any(example.trained[1:]):
                left_out.append(Rejected(str(file.path), row.line, "no token to train on within max_length"))
            else:
                examples.append(example)
                rows.append(row)
        check_share(bad, file.total)
        self.tally.rejected += sorted(bad + left_out, key=lambda row: row.line)
        return Dataset(examples, rows)

    def _fit(self, example: Example, path: Path) -> Example | None:
        if example.longest <= self.limit.max_length:
            return example
        if self.limit.too_long == "error":
            raise InputError(f"{path}:{example.line}: the row has {example.longest} tokens, {self.limit.remedy}")
        if self.limit.too_long == "drop":
            return None
        self.tally.truncated += 1
        return example.cut(self.limit.max_length)
