"""What stands for a layer's weight where an architecture reads `layer.weight` outside the layer.

Most read only its dtype, device or shape, to cast or place an input (Mamba's `x_proj.weight.device`). These are known;
the values are made when something computes with them, and not before.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class WeightStandIn(Tensor):
    """A weight (d_out, d_in) without values of its own.

    `make` gives them for every operation that asks; it may refuse with an InputError. No gradient reaches them.
    """

    make: Callable[[], Tensor]

    # No subclass survives an operation: what comes out of one is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation on the values."""

        def values(x: Any) -> Any:
            return x.make().to(x.dtype) if isinstance(x, WeightStandIn) else x

        return func(*tree_map(values, tuple(args)), **tree_map(values, dict(kwargs or {})))

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"WeightStandIn(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def weight_stand_in(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]
) -> WeightStandIn:
    """A `WeightStandIn` of this shape (d_out, d_in), dtype and device."""
    stand_in = torch.Tensor._make_wrapper_subclass(WeightStandIn, tuple(shape), dtype=dtype, device=device)  # pyright: ignore
    stand_in.make = make
    return stand_in
