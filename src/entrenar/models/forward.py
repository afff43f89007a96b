"""One forward pass that makes logits only where a prediction is wanted."""

import inspect

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.core.errors import InputError


def target_logits(model: PreTrainedModel, ids: Tensor, attention: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits that predict the target tokens, and those tokens.

    The model's own head runs (so softcapping and scaling hold) on the columns that any row needs, not on every
    position. Letters: B rows, T tokens, N targets, V vocabulary.

    Args:
        ids: (B, T) int64. attention: (B, T) int64, 1 for real tokens. targets: (B, T) bool, first column False.

    Returns:
        logits (N, V) in the model's dtype, and labels (N,) int64.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise InputError(f"{type(model).__name__} cannot make logits for chosen positions: this version needs that")
    columns = targets[:, 1:].any(dim=0).nonzero().flatten()
    output = model(input_ids=ids, attention_mask=attention, logits_to_keep=columns, use_cache=False)
    wanted = targets[:, 1:][:, columns]
    return output.logits[wanted], ids[:, 1:][:, columns][wanted]


def target_loss(model: PreTrainedModel, ids: Tensor, attention: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in float32, summed over the target tokens; arguments as in `target_logits`."""
    logits, labels = target_logits(model, ids, attention, targets)
    return F.cross_entropy(logits.float(), labels, reduction="sum")
