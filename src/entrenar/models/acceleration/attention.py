"""`entrenar` in transformers' attention interface: our causal kernel on a CPU where the mask is of its kind, else
PyTorch's.

transformers describes documents, padding and sliding windows by one boolean mask, as it does for `sdpa`. A mask in
which every token sees one stretch of keys that ends with itself, with one gap at most, is the kernel's kind
(ops/attention.py); it is read once and serves every layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entrenar.core.attachment import Attachment
from entrenar.ops.attention import attention_mask, causal_attention

NAME = "entrenar"
Attend = Callable[..., tuple[Tensor, Any]]
_stand_in: ContextVar[Attend | None] = ContextVar("stand_in", default=None)
# Of a mask that has been read, in a tuple: None inside is a mask of another kind.
_FIRST_KEYS = Attachment[tuple[Tensor | None]]("first_keys")
# What a call may ask for and still be the kernel's: a scale; what the mask says already; what is for others to know.
_KNOWN = {"dropout", "scaling", "is_causal", "position_ids", "use_cache", "sliding_window"}


@contextmanager
def intercepted(stand_in: Attend) -> Iterator[None]:
    """Let `stand_in` attend meanwhile, in this thread; it is called as transformers calls `attention_forward`."""
    before = _stand_in.set(stand_in)
    try:
        yield
    finally:
        _stand_in.reset(before)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it.

    Args:
        query: (B, H, T, D); key, value: (B, G, S, D). attention_mask: (B, 1, T, S) bool, or None for plain causal.
    Returns:
        (B, T, H, D), and None for the weights.
    """
    stand_in = _stand_in.get()
    if stand_in is not None:
        return stand_in(module, query, key, value, attention_mask, **options)
    starts = None
    asked = {name for name, value in options.items() if value is not None}
    plain = query.device.type == "cpu" and not options.get("dropout") and asked <= _KNOWN
    plain = plain and query.shape[2] == key.shape[2]
    if plain and attention_mask is not None:
        starts = first_keys(attention_mask)
        plain = starts is not None
    causal = options.get("is_causal")
    if not plain or not (getattr(module, "is_causal", True) if causal is None else causal):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = query.shape[3] ** -0.5 if options.get("scaling") is None else options["scaling"]
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return causal_attention(q, k, v, scale, starts), None


def first_keys(mask: Tensor) -> Tensor | None:
    """The first key of each token, (B, T) int32, or with gaps (B, T, 3), if mask (B, 1, T, T) bool is of the kernel's
    kind; else None.

    A token that does not see itself is padding, whose result nobody reads: it counts as seeing itself alone.
    """
    read = _FIRST_KEYS.of(mask)
    if read is None:
        read = (_read(mask),)
        _FIRST_KEYS.hang(mask, read)
    return read[0]


def _read(mask: Tensor) -> Tensor | None:
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    seen = mask[:, 0]
    index = torch.arange(mask.shape[-1], device=mask.device)
    real = seen.diagonal(dim1=1, dim2=2)
    starts = torch.where(real, seen.to(torch.uint8).argmax(dim=-1), index)
    stretch = (index >= starts[..., None]) & (index <= index[:, None])
    if ((stretch == seen) | ~real[..., None]).all():
        return None if (starts.diff(dim=-1) < 0).any() else starts.int()
    hidden = stretch & ~seen & real[..., None]
    gap = torch.where(hidden.any(dim=-1), hidden.to(torch.uint8).argmax(dim=-1), 0)
    with_gap = torch.stack([starts, gap, gap + hidden.sum(dim=-1)], dim=-1).int()
    return with_gap if ((attention_mask(with_gap) == seen) | ~real[..., None]).all() else None


def register() -> None:
    """Make `entrenar` known to transformers, with the masks that `sdpa` gets."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
