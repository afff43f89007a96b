"""Attention in trees of sequences (data/tree.py): the masks that say what a branch sees.

Positions say where trees branch: 0 begins a document's trunk, any other step than one up begins a branch of it. A
branch that begins at position p sees the trunk's tokens at positions below p, and itself. transformers hands a mask of
four dimensions on as it is; models with several kinds of layers take one for each.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_SLIDING = "sliding_attention"


def has_branches(positions: Tensor) -> bool:
    """Whether a run of positions (B, T) begins elsewhere than at 0; on a GPU this waits for it."""
    later = positions[:, 1:]
    return bool(((later != positions[:, :-1] + 1) & (later != 0)).any())


def branch_mask(positions: Tensor, window: int | None = None) -> Tensor:
    """Which keys each token sees: positions (B, T) → (B, 1, T, T) bool.

    Args:
        window: tokens that a sliding window holds, the seeing one among them; counted by positions.
    """
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    runs, documents = starts.cumsum(1), (positions == 0).cumsum(1)
    index = torch.arange(positions.shape[1], device=positions.device)
    first = positions.gather(1, torch.where(starts, index, 0).cummax(1).values)  # position at which the run begins
    in_trunk = first == 0
    same_run = runs[:, :, None] == runs[:, None, :]
    leads = in_trunk[:, None, :] & (positions[:, None, :] < first[:, :, None])
    seen = (same_run | leads) & (documents[:, :, None] == documents[:, None, :]) & (index <= index[:, None])
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    return seen.unsqueeze(1)


def branch_masks(model: PreTrainedModel, positions: Tensor) -> Any:
    """`attention_mask` for a batch with branches: one mask, or one for each kind of layer."""
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if len(kinds) > 1:
        masks = {kind: branch_mask(positions, window if kind == _SLIDING else None) for kind in kinds}
        return {kind: _as_taken(model, mask) for kind, mask in masks.items()}
    slides = kinds == {_SLIDING} or (not kinds and getattr(config, "use_sliding_window", True))
    return _as_taken(model, branch_mask(positions, window if slides else None))


def _as_taken(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """Eager attention adds its mask to the scores."""
    mask = mask.to(model.device)
    if getattr(model.config, "_attn_implementation", None) != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )
