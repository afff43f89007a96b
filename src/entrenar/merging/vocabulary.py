"""One vocabulary for models whose tokenizers differ: `tokenizer_source: base | union | <path of a model>`.

Rows of embedding and head follow their token, not their number. A token that a model lacks takes the base's row, else
the only row there is, else the mean of the rows of the models that have it; it is then merged like any other.
"""

import json
import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from entrenar.core.documents import read_json
from entrenar.core.errors import InputError, listing
from entrenar.merging.models import InputModel, InputTensor
from entrenar.merging.stack import Scratch

_BY_TOKEN = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings", "lm_head")
_MOST_TOKENS = 1 << 26


@dataclass
class _AlignedReader:
    """An embedding in the result's order of tokens, made in memory when it is first read."""

    vocabulary: "Vocabulary"
    label: str
    name: str
    dtype: torch.dtype
    step: int = 1
    _flat: Tensor | None = None

    def read(self, start: int, count: int, scratch: Scratch, role: Hashable) -> Tensor:  # noqa: ARG002 - TensorReader's
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
        return InputTensor(shape, tensor.dtype, _AlignedReader(self, label, name, tensor.source.dtype), tensor.bytes)

    def _is_own(self, label: str) -> bool:
        ids = self.vocabularies[label]
        return all(ids.get(token) == index for token, index in self.tokens.items())

    def rows_of(self, label: str, name: str) -> Tensor:
        """(rows, columns) float: a model's rows by the result's tokens, gaps filled."""
        rows_there, has = self._place(label, name)
        if bool(has.all()):
            return rows_there
        others = {other: self._place(other, name) for other in self.models if other != label}
        total, count = torch.zeros_like(rows_there, dtype=torch.float32), torch.zeros(self.rows)
        for rows, present in others.values():
            total[present] += rows[present].float()
            count += present
        column = (-1, *[1] * (rows_there.dim() - 1))
        fill = total / count.clamp(min=1).view(column)
        if self.base in others:
            rows, present = others[self.base]
            fill[present] = rows[present].float()
        return torch.where(has.view(column), rows_there.float(), fill)

    def _place(self, label: str, name: str) -> tuple[Tensor, Tensor]:
        """(rows, columns) with this model's rows at the result's ids, and (rows,) where it has one."""
        model = self.models[label]
        tensor = model.tensors.get(name) or next(t for n, t in model.tensors.items() if "embed_tokens" in n)
        scratch = Scratch()
        stored = tensor.source.read(0, math.prod(tensor.shape), scratch, "rows").view(tensor.shape)
        vocabulary = self.vocabularies[label]
        pairs = [(new, vocabulary[token]) for token, new in self.tokens.items() if token in vocabulary]
        pairs = [(new, old) for new, old in pairs if old < len(stored) and new < self.rows]
        new, old = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        placed = torch.zeros((self.rows, *stored.shape[1:]), dtype=stored.dtype)
        placed[new] = stored[old]
        has = torch.zeros(self.rows, dtype=torch.bool)
        has[new] = True
        unnamed = torch.ones(self.rows, dtype=torch.bool)  # padding rows, which no token names
        unnamed[list(self.tokens.values())] = False
        unnamed[len(stored) :] = False
        padding = unnamed.nonzero().flatten()
        placed[padding] = stored[padding]
        return placed, has | unnamed


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
        every = (token for ids in vocabularies.values() for token in sorted(ids, key=ids.__getitem__))
        added = [token for token in dict.fromkeys(every) if token not in tokens]
        tokens |= {token: max(tokens.values(), default=-1) + 1 + index for index, token in enumerate(added)}
    rows = max(rows, max(tokens.values(), default=-1) + 1)
    _check_rows(tokens, vocabularies, models)
    return Vocabulary(models[label], tokens, added, rows, reference.label, models, vocabularies)


def _check_rows(tokens: dict[str, int], vocabularies: dict[str, dict[str, int]], models: dict[str, InputModel]) -> None:
    """InputError for a token of which no model has a row: there is nothing that the result's could be made of."""
    rows = {label: _embedding_rows(model) for label, model in models.items()}
    bare = [
        token
        for token in tokens
        if not any(ids.get(token, rows[label]) < rows[label] for label, ids in vocabularies.items())
    ]
    if bare:
        raise InputError(
            f"no model has a row in its embedding for {listing([repr(token) for token in bare], 3)}: there is nothing "
            "to merge for such tokens, so remove them from the tokenizer.json that has them, or leave tokenizer_source "
            "out"
        )


def is_vocabulary(name: str) -> bool:
    """Whether a tensor outside of the layers has a row for every token."""
    return any(word in name for word in _BY_TOKEN) and "position" not in name and "per_layer" not in name


def _embedding_rows(model: InputModel) -> int:
    names = [name for name in model.outside if is_vocabulary(name) and not name.startswith(("lm_head", "embed_out"))]
    if not names:
        raise InputError(f"{model.label} has no embedding that is known, and tokenizer_source needs it: leave it out")
    return model.tensors[names[0]].shape[0]


@dataclass(frozen=True)
class _Added:
    """A token of a tokenizer.json that stands beside the vocabulary, and how it is found in a text."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


@dataclass(frozen=True)
class _Model:
    vocab: dict[str, int] | list[tuple[str, float]] | None = None


@dataclass(frozen=True)
class _Tokenizer:
    model: _Model
    added_tokens: list[_Added] = field(default_factory=list)


def _tokenizer_of(model: InputModel) -> _Tokenizer:
    if model.directory is None:
        raise InputError(f"tokenizer_source needs a tokenizer.json, which {model.label} has not: leave it out")
    return read_json(model.directory / "tokenizer.json", "tokenizer (which tokenizer_source needs)", _Tokenizer)


def _vocabulary_of(model: InputModel) -> dict[str, int]:
    tokenizer = _tokenizer_of(model)
    vocabulary = tokenizer.model.vocab
    if vocabulary is None:
        raise InputError(f"{model.label} has a tokenizer without a vocabulary: tokenizer_source cannot be used with it")
    if isinstance(vocabulary, list):  # unigram: [token, score] by id
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    ids = vocabulary | {entry.content: entry.id for entry in tokenizer.added_tokens}
    odd = next((token for token, index in ids.items() if not 0 <= index < _MOST_TOKENS), None)
    if odd is not None:
        raise InputError(f"{model.label}: the tokenizer gives {odd!r} the id {ids[odd]}, which cannot be")
    return ids


def write_added_tokens(file: Path, vocabulary: Vocabulary) -> None:
    """Append the added tokens to a tokenizer.json: whole words that are found before the tokenizer splits a text.

    A token that one of the models has beside its vocabulary (a special one, say) stays what it is there.
    """
    tokenizer = read_json(file, "tokenizer")
    known: dict[str, _Added] = {}
    for model in vocabulary.models.values():
        for entry in _tokenizer_of(model).added_tokens:
            known.setdefault(entry.content, entry)
    entries = [
        asdict(replace(known.get(token, _Added(0, token)), id=vocabulary.tokens[token])) for token in vocabulary.added
    ]
    tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or []), *entries]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=2), encoding="utf-8")
