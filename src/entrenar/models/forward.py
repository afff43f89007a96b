"""One forward pass that makes logits only where a prediction is wanted, and for a loss a chunk of them at a time."""

import inspect
import logging
from functools import cache, partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.layers.linear_cross_entropy import (
    Segments,
    chunk_rows,
    chunked_loss,
    linear_cross_entropy,
    summed_cross_entropy,
)
from entrenar.models.branches import branch_masks, has_branches
from entrenar.models.head import head_input, output_head, own_logits, vocabulary_size

_LOG = logging.getLogger(__name__)


def target_logits(model: PreTrainedModel, ids: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that predict the target tokens, and those tokens.

    The model's own head runs (so softcapping and scaling hold) on the columns that any row needs, not on every
    position. Letters: B rows, T tokens, N targets, V vocabulary.

    Args:
        ids: (B, T) int64, on any device. targets: (B, T) bool, first column False.
        positions: (B, T) int64, from 0 in every document of a row (`data.batches.Batch`); without an attention mask
            transformers keeps documents apart by them, see `models.isolation`. Branches: see `models.branches`.

    Returns:
        logits (N, V) in the model's dtype, and labels (N,) int64.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{type(model).__name__} cannot make logits for chosen positions: this version needs that")
    columns = targets[:, 1:].any(dim=0).nonzero().flatten()
    ids, targets, columns = (tensor.to(model.device) for tensor in (ids, targets, columns))
    output = model(**model_inputs(model, ids, positions), logits_to_keep=columns)
    wanted = targets[:, 1:][:, columns]
    return output.logits[wanted], ids[:, 1:][:, columns][wanted]


def target_loss(model: PreTrainedModel, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in float32, summed over the target tokens in float64; arguments as in `target_logits`.

    The logits (N, V) never exist at once: see linear_cross_entropy.py. A model that does to its logits what head.py
    cannot read runs its own code on them, a chunk at a time; one whose head is not a layer it calls makes them all.
    """
    return _target_loss(model, ids, positions, targets, None)


def sequence_losses(model: PreTrainedModel, ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """The same, summed within each sequence: (S,) float64, of the documents row by row (the order of `Batch.lines`)."""
    sequence = (positions == 0).flatten().cumsum(0) - 1
    of_targets = sequence[targets.flatten()]
    return _target_loss(model, ids, positions, targets, Segments(of_targets, int(sequence[-1]) + 1))


def _target_loss(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, targets: Tensor, segments: Segments | None
) -> Tensor:
    # Where the batch lies: a GPU would have to be waited for to know how many there are.
    wanted = targets.flatten().nonzero().flatten()
    ids, wanted = ids.to(model.device), wanted.to(model.device)
    segments = segments.to(model.device) if segments else None
    before_head = head_input(model, **model_inputs(model, ids, positions))
    if before_head is None or before_head.hidden.shape[:2] != ids.shape:
        _say_once(f"{type(model).__name__} has no head that can be run alone: the loss takes two passes and all logits")
        logits, labels = target_logits(model, ids, positions, targets)
        return summed_cross_entropy(logits, labels, segments)
    # What predicts a token stands one before it, in the same row. By index: the gradient of a mask is summed slowly.
    hidden, labels = before_head.hidden.flatten(0, 1).index_select(0, wanted - 1), ids.flatten()[wanted]
    if before_head.rule is None:
        _say_once(f"{type(model).__name__} neither scales nor softcaps its logits but changes them: a slower loss")
        return _own_loss(model, hidden, labels, segments)
    head, vocabulary = output_head(model), vocabulary_size(model)
    return linear_cross_entropy(hidden, head, labels, vocabulary, before_head.rule, segments)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether positions can be given to the model at all; one that takes none counts its own."""
    return "position_ids" in inspect.signature(model.forward).parameters


def model_inputs(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> dict[str, Any]:
    """What a forward without a cache takes for ids and positions, both (B, T) int64; a mask only where a document has
    branches, for it costs what it says of every pair of tokens."""
    inputs: dict[str, Any] = {"input_ids": ids.to(model.device), "use_cache": False}
    if takes_positions(model):
        inputs["position_ids"] = positions.to(model.device)
    if has_branches(positions):
        inputs["attention_mask"] = branch_masks(model, positions)
    return inputs


def _own_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor, segments: Segments | None) -> Tensor:
    """The loss through the model's own forward; a chunk's logits are made once more in the backward pass."""
    rows = chunk_rows(len(hidden), vocabulary_size(model), hidden.dtype)
    return chunked_loss(partial(own_logits, model), hidden, labels, rows, segments)


@cache
def _say_once(message: str) -> None:
    _LOG.warning(message)
