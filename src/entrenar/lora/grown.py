"""Adapters of a model whose vocabulary had grown: its embedding and head have rows that the base lacks.

They stand in the adapter's file whole (`modules_to_save`), as the base's own weights beside it (peft's
`save_embedding_layers`), or as rows of single tokens. Room is made for them before the adapter is laid over.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError, listing
from entrenar.files.peft import PeftAdapter
from entrenar.files.peft_tensors import ROWS_END
from entrenar.lora.token_rows import embedding_and_head, is_tied, resize_vocabulary

_GAP = 1 << 16  # rows that a vocabulary may have been padded by


def make_room(model: nn.Module, adapter: PeftAdapter, source: str) -> None:
    """Give the model rows for the tokens that the adapter has rows for; `source` names it in errors.

    Raises:
        InputError: the adapter has new rows for the embedding alone or for the head alone.
    """
    if not adapter.needs_rows or not hasattr(model, "get_input_embeddings"):
        return
    embedding, head = embedding_and_head(model)
    if adapter.needs_rows <= embedding.num_embeddings:
        return
    check_tokens(adapter, embedding.num_embeddings, source)
    names = [f"{name}.weight" for part in (embedding, head) for name, module in model.named_modules() if module is part]
    tied, before = head is not None and is_tied(embedding, head), embedding.num_embeddings
    grown = new_rows(names, adapter, before, source, tied=tied)
    resize_vocabulary(model, adapter.needs_rows)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, rows in grown.items():
            parameters[name][before:] = rows.to(parameters[name])


def check_tokens(adapter: PeftAdapter, before: int, source: str) -> None:
    """InputError for tokens without rows in the file, or so far beyond the model's that they are no next ones."""
    rows = {len(tensor) for name, tensor in adapter.tensors.saved.items() if name.endswith(ROWS_END)}
    for name, tokens in adapter.token_indices.items():
        if len(tokens) not in rows or max(tokens) >= before + len(tokens) + _GAP:
            raise InputError(
                f"{source} names token {max(tokens)} for {name or 'the embedding'}, which has {before} rows here and "
                f"{'too few new ones' if len(tokens) in rows else 'none for it'} in the adapter's file: save it again"
            )


def new_rows(names: Sequence[str], adapter: PeftAdapter, before: int, source: str, *, tied: bool) -> dict[str, Tensor]:
    """Weight → its rows from `before` on as the base had them under the adapter, where the file says so.

    Args:
        names: the weights of the embedding and of the head.

    Raises:
        InputError: see `make_room`.
    """
    base = {
        name: adapter.tensors.base[name][before:] for name in names if _has_grown(adapter.tensors.base, name, before)
    }
    whole = {name for name in names if _has_grown(adapter.tensors.saved, name, before)}
    if tied:
        base = {name: rows for rows in list(base.values())[:1] for name in names}
        whole = set(names) if whole and adapter.keeps_ties else whole
    lacking = [name for name in names if name not in base and name not in whole]
    if lacking and (base or whole):
        raise InputError(
            f"{source} has an embedding or a head of {adapter.needs_rows} rows where the model has {before}, and no "
            f"rows for {listing(lacking)}: save it with both (peft: save_embedding_layers=True)"
        )
    return base


def is_same(weight: Tensor, given: Tensor) -> bool:
    """Whether the base's weight in an adapter's file, `given`, is the model's, as far as the model's dtype tells."""
    return weight.shape == given.shape and torch.equal(weight.float(), given.to(weight.dtype).float())


def _has_grown(tensors: Mapping[str, Tensor], name: str, before: int) -> bool:
    return name in tensors and tensors[name].dim() == 2 and len(tensors[name]) > before
