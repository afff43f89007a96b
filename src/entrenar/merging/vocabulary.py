"""One vocabulary for models whose tokenizers differ: `tokenizer_source: base | union | <path of a model>`.

Rows of embedding and head follow their token, not their number. A token that a model lacks takes the base's row, else
the only row there is, else the mean of the rows of the models that have it; it is then merged like any other.
"""

import json
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.merging.models import InputModel, InputTensor
from entrenar.merging.stack import Scratch


@dataclass
class _AlignedSource:
    """An embedding in the result's order of tokens, made in memory when it is first read."""

    vocabulary: "Vocabulary"
    label: str
    name: str
    dtype: torch.dtype
    step: int = 1
    _flat: Tensor | None = None

    def read(self, start: int, count: int, scratch: Scratch, role: Hashable) -> Tensor:  # noqa: ARG002 - Source's
        """A view."""
        if self._flat is None:
            self._flat = self.vocabulary.rows_of(self.label, self.name).to(self.dtype).reshape(-1)
        return self._flat[start : start + count]


@dataclass
class Vocabulary:
    """The result's tokens and where each model has them.

    Attributes:
        tokenizer: the model whose tokenizer files the result has. tokens: token → id, of the result.
        added: tokens that those files do not have, in order. rows: of the result's embedding.
    """

    tokenizer: InputModel
    tokens: dict[str, int]
    added: list[str]
    rows: int
    base: str
    models: dict[str, InputModel]
    vocabularies: dict[str, dict[str, int]] = field(repr=False)

    def aligned(self, label: str, name: str, tensor: InputTensor) -> InputTensor:
        """An embedding or head of a model in the result's order; itself where that is its own."""
        if tensor.shape[0] == self.rows and self._is_own(label):
            return tensor
        shape = (self.rows, *tensor.shape[1:])
        return InputTensor(shape, tensor.dtype, _AlignedSource(self, label, name, tensor.source.dtype), tensor.bytes)

    def _is_own(self, label: str) -> bool:
        own = self.vocabularies[label]
        return all(own.get(token) == index for token, index in self.tokens.items())

    def rows_of(self, label: str, name: str) -> Tensor:
        """(rows, columns) float: a model's rows by the result's tokens, gaps filled."""
        found, has = self._place(label, name)
        if bool(has.all()):
            return found
        others = {other: self._place(other, name) for other in self.models if other != label}
        total, count = torch.zeros_like(found, dtype=torch.float32), torch.zeros(self.rows)
        for rows, present in others.values():
            total[present] += rows[present].float()
            count += present
        fill = total / count.clamp(min=1)[:, None]
        if self.base in others:
            rows, present = others[self.base]
            fill[present] = rows[present].float()
        return torch.where(has[:, None], found.float(), fill)

    def _place(self, label: str, name: str) -> tuple[Tensor, Tensor]:
        """(rows, columns) with this model's rows at the result's ids, and (rows,) where it has one."""
        model = self.models[label]
        tensor = model.tensors.get(name) or next(t for n, t in model.tensors.items() if "embed_tokens" in n)
        scratch = Scratch()
        own = tensor.source.read(0, math.prod(tensor.shape), scratch, "rows").view(tensor.shape)
        vocabulary = self.vocabularies[label]
        pairs = [(new, vocabulary[token]) for token, new in self.tokens.items() if token in vocabulary]
        pairs = [(new, old) for new, old in pairs if old < len(own) and new < self.rows]
        new, old = (torch.tensor(column) for column in zip(*pairs, strict=True))
        found = torch.zeros((self.rows, *own.shape[1:]), dtype=own.dtype)
        found[new] = own[old]
        has = torch.zeros(self.rows, dtype=torch.bool)
        has[new] = True
        unnamed = torch.ones(self.rows, dtype=torch.bool)  # padding rows, which no token names
        unnamed[list(self.tokens.values())] = False
        kept = unnamed[: len(own)].nonzero().flatten()
        found[kept] = own[kept]
        return found, has | unnamed


def align(choice: str | None, models: dict[str, InputModel], reference: InputModel) -> Vocabulary | None:
    """The vocabulary that `tokenizer_source` names; None where it says nothing: embeddings then have to fit."""
    if choice is None:
        return None
    vocabularies = {label: _vocabulary_of(model) for label, model in models.items()}
    label = choice.removeprefix("model:")
    if label in ("base", "union"):
        label = reference.label
    if label not in models:
        raise InputError(
            f"tokenizer_source is {choice!r}: it is base, union, or one of the models: {', '.join(models)}"
        )
    tokens, rows = dict(vocabularies[label]), _embedding_rows(models[label])
    added: list[str] = []
    if choice == "union":
        every = (token for own in vocabularies.values() for token in sorted(own, key=own.__getitem__))
        added = [token for token in dict.fromkeys(every) if token not in tokens]
        tokens |= {token: max(tokens.values()) + 1 + index for index, token in enumerate(added)}
    rows = max(rows, max(tokens.values()) + 1)
    return Vocabulary(models[label], tokens, added, rows, reference.label, models, vocabularies)


def _embedding_rows(model: InputModel) -> int:
    return next((t.shape[0] for n, t in model.tensors.items() if "embed_tokens" in n or "wte" in n), 0)


def _vocabulary_of(model: InputModel) -> dict[str, int]:
    if model.directory is None:
        raise InputError(f"tokenizer_source needs a tokenizer.json, which {model.label} has not: leave it out")
    file = model.directory / "tokenizer.json"
    tokenizer = _read_json(file)
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if not isinstance(vocabulary, dict | list):
        raise InputError(f"{file} has no vocabulary: tokenizer_source cannot be used with this tokenizer")
    if isinstance(vocabulary, list):  # unigram: [token, score] by id
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    return vocabulary | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read, and tokenizer_source needs it: {error}") from None


def write_added_tokens(file: Path, vocabulary: Vocabulary) -> None:
    """Append the added tokens to a tokenizer.json: whole words that are found before the tokenizer splits a text."""
    tokenizer = _read_json(file)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer.setdefault("added_tokens", []).extend(
        {"id": vocabulary.tokens[token], "content": token, **plain} for token in vocabulary.added
    )
    file.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
