"""New tokens: rows for them in embedding and output head, of which only they are trained (peft's
`trainable_token_indices`).

A module is wrapped: its own weight stays frozen, and the trained rows, float32, stand in for theirs wherever they are
looked up or make a logit. Tied, embedding and head share them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.lora.matching import has_suffix

Indices = Mapping[str, Sequence[int]]
"""End of a module's name (`embed_tokens`, `lm_head`; "": the embedding) → the tokens whose rows are trained."""


class TokenRows(nn.Module):
    """An embedding (V, H) or a head (V, H) with some rows of its own.

    Args:
        base: nn.Embedding or nn.Linear, frozen. indices: token ids. rows: (n, H) float32 of another module that is tied
            to this one; None: a copy of the base's.
    """

    def __init__(self, base: nn.Module, indices: Sequence[int], rows: nn.Parameter | None = None) -> None:
        super().__init__()
        weight = cast(Tensor, base.weight)
        self.base, self.indices, self.is_tied = base, list(indices), rows is not None
        chosen = torch.tensor(self.indices, device=weight.device)
        self.rows = nn.Parameter(weight.detach()[chosen].float().clone()) if rows is None else rows
        places = torch.full((len(weight),), -1, device=weight.device)
        places[chosen] = torch.arange(len(chosen), device=weight.device)
        self.register_buffer("_places", places, persistent=False)
        self.register_buffer("_chosen", chosen, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The base's: what transformers asks of an embedding."""
        return cast(Tensor, self.base.weight)

    def fused_weight(self) -> Tensor:
        """The weight with the rows in it, (V, H) in the base's dtype."""
        return self.weight.detach().index_copy(0, self.get_buffer("_chosen"), self.rows.detach().to(self.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (...) int64 → (..., H); or hidden states (..., H) → logits (..., V)."""
        return self._logits(x) if isinstance(self.base, nn.Linear) else self._look_up(x)

    def _look_up(self, ids: Tensor) -> Tensor:
        plain, places = self.base(ids), self.get_buffer("_places")[ids]
        trained = F.embedding(places.clamp(min=0), self.rows) * getattr(self.base, "embed_scale", 1.0)
        return torch.where((places >= 0).unsqueeze(-1), trained.to(plain.dtype), plain)

    def _logits(self, hidden: Tensor) -> Tensor:
        plain, chosen, bias = self.base(hidden), self.get_buffer("_chosen"), cast(Any, self.base).bias
        trained = F.linear(hidden, self.rows.to(hidden.dtype), None if bias is None else bias[chosen].to(hidden.dtype))
        return plain.index_copy(-1, chosen, trained.to(plain.dtype))

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"{len(self.indices)} rows"


def rows_for(model: nn.Module, indices: Sequence[int]) -> dict[str, list[int]]:
    """`Indices` for embedding and head of a model; for the embedding alone if the head is tied to it."""
    embedding, head = embedding_and_head(model)
    names = [_name_of(model, embedding)]
    if head is not None and not is_tied(embedding, head):
        names.append(_name_of(model, head))
    return {name.rpartition(".")[2]: list(indices) for name in names}


def token_rows(
    model: nn.Module, indices: Indices, taken: Sequence[str], *, keeps_ties: bool = True
) -> dict[str, nn.Module]:
    """Path → what takes the place of the modules that `indices` name, and of a head that shares rows with one.

    Args:
        taken: modules that are adapted or trained whole.
        keeps_ties: as in `shared_rows`.

    Raises:
        InputError: a name that is neither the embedding nor the head, a token that has no row, a module that is taken,
            or one held in its file's own blocks.
    """
    if not indices:
        return {}
    embedding, head = embedding_and_head(model)
    names = [_name_of(model, part) for part in (embedding, head) if part is not None]
    tied = head is not None and is_tied(embedding, head)
    chosen, shares = shared_rows(names, indices, tied=tied, keeps_ties=keeps_ties)
    parts: dict[str, Any] = dict(zip(names, (embedding, head), strict=False))
    for name in (*chosen, *(names[1:] if shares else ())):
        if name in taken:
            raise InputError(f"{name} is adapted or trained whole, so its rows are not trained apart: choose one")
        _check_plain(name, parts[name])
    for name, tokens in chosen.items():
        outside = [token for token in tokens if not 0 <= token < len(cast(Tensor, parts[name].weight))]
        if outside or len(set(tokens)) < len(tokens):
            raise InputError(f"{name} has no row of its own for each of the tokens {listing([*map(str, tokens)], 5)}")
    wrapped = {name: TokenRows(parts[name], tokens) for name, tokens in chosen.items()}
    if shares:
        wrapped[names[1]] = TokenRows(parts[names[1]], chosen[names[0]], wrapped[names[0]].rows)
    return {**wrapped}


def shared_rows(
    names: Sequence[str], indices: Indices, *, tied: bool, keeps_ties: bool = True
) -> tuple[dict[str, list[int]], bool]:
    """Which of embedding and head has rows for which tokens, and whether the head shares the embedding's.

    As in peft: the head of a tied pair does, unless it is named with other tokens. Then both have their own.

    Args:
        names: paths of the embedding and, if there is one, of the head. tied: whether the two are one weight.
        keeps_ties: peft's `ensure_weight_tying`, by which other tokens for the head are refused.

    Raises:
        InputError: a name that is neither, or other tokens for a tied head that is to stay tied.
    """
    chosen: dict[str, list[int]] = {}
    for suffix, tokens in indices.items():
        name = next((name for name in names if not suffix or has_suffix(name, suffix)), None)
        if name is None:
            raise InputError(f"rows of {suffix} cannot be trained: tokens have rows in {listing(list(names))}")
        if chosen.setdefault(name, list(tokens)) != list(tokens):
            raise InputError(f"rows of {name} are named twice, with different tokens: name them once")
    if not tied or names[0] not in chosen:
        return chosen, False
    if chosen.get(names[1], chosen[names[0]]) != chosen[names[0]]:
        if keeps_ties:
            raise InputError(f"{names[1]} is tied to {names[0]} and named with other tokens: name the same for both")
        return chosen, False
    return {names[0]: chosen[names[0]]}, True


def resize_vocabulary(model: nn.Module, rows: int) -> None:
    """Give embedding and head at least `rows` rows, in place: new ones are the mean of the old.

    Raises:
        InputError: the embedding is held in its file's own blocks.
    """
    embedding, head = embedding_and_head(model)
    if rows <= embedding.num_embeddings:
        return
    was_tied = head is not None and is_tied(embedding, head)
    for part in (embedding, head):
        if part is None or (part is head and was_tied):
            continue
        _check_plain(_name_of(model, part), part)
        part.weight = nn.Parameter(extended(cast(Tensor, part.weight).detach(), rows), requires_grad=False)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias = nn.Parameter(F.pad(part.bias.detach(), (0, rows - len(part.bias))), requires_grad=False)
    if head is not None and was_tied:
        head.weight = embedding.weight
    for part, size in ((embedding, "num_embeddings"), (head, "out_features")):
        if part is not None:
            setattr(part, size, rows)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.get_text_config().vocab_size = rows


def extended(weight: Tensor, rows: int) -> Tensor:
    """(V, H) → (rows, H), the new rows the mean of the old."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat((weight, mean.expand(rows - len(weight), -1)))


def _check_plain(name: str, part: nn.Module) -> None:
    if not isinstance(part, nn.Embedding | nn.Linear):
        raise InputError(
            f"{name} is held in its file's own blocks, to which no rows are added: load the model with quantize: nf4, "
            "which leaves it in floats"
        )


def embedding_and_head(model: Any) -> tuple[Any, Any]:
    """The modules of a model of transformers, without rows of their own around them; None for a head that is not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    bare = [part.base if isinstance(part, TokenRows) else part for part in (embedding, head)]
    return bare[0], bare[1]


def is_tied(embedding: Any, head: Any) -> bool:
    """Whether the two hold one weight."""
    return getattr(embedding, "weight", None) is not None and embedding.weight is getattr(head, "weight", None)


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)
