"""Attention as it is defined, in float64."""

import torch
from torch import Tensor

from entrenar.ops.attention import attention_mask


def exactly(q: Tensor, k: Tensor, v: Tensor, scale: float, starts: Tensor | None) -> Tensor:
    """The definition, in float64."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.double().repeat_interleave(groups, dim=2), v.double().repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) * scale
    seen = attention_mask(torch.zeros(q.shape[:2], dtype=torch.int32) if starts is None else starts)
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)
