"""A user's plain text, as tokens."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, where: str, purpose: str, most: int) -> Tensor:
    """At most the first `most` tokens of `text`, (T,) int64; InputError if there are not two. `where` it is from, and
    the `purpose` it was named for, are words for the message."""
    encoded: list[int] = tokenizer(text)["input_ids"][:most]  # pyright: ignore
    if len(encoded) < 2:
        raise InputError(f"{where} has {len(encoded)} tokens: name a longer text to {purpose}")
    return torch.tensor(encoded)


def text_rows(
    tokenizer: PreTrainedTokenizerBase, text: str, where: str, purpose: str, *, row: int, most: int
) -> list[Tensor]:
    """The same in rows of `row` tokens, `most` rows at most; what is left at the end counts if it is two tokens."""
    return [ids for ids in token_ids(tokenizer, text, where, purpose, row * most).split(row) if len(ids) > 1]


def read_text(path: str | Path, purpose: str) -> str:
    """The content of a file; InputError if it cannot be read as UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the text {path} to {purpose}: {error}; name a UTF-8 file") from None
