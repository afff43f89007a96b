"""In what dtype an elementwise operation computes before it rounds once to the dtype of its result."""

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float64 if the first one is, else in float32."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)
