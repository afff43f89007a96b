"""The `entrenar` namespace of torch.library: how an operation of this room is registered.

Each operation has a schema, a PyTorch reference that runs on any device, a native CPU implementation that gives the
same bits (the same to rounding where it sums or takes exponentials), a fake (what shapes come out, for torch.compile),
and where it is differentiable an autograd formula.
"""

from collections.abc import Callable
from typing import Any

import torch

from entrenar.ops import native

_LIBRARY = torch.library.Library("entrenar", "DEF")


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    native_cpu: Callable[..., Any],
    fake: Callable[..., Any],
    accepts: Callable[..., bool],
) -> None:
    """Register one operation.

    Args:
        schema: `name(Tensor x, …) -> Tensor`.
        reference: plain PyTorch; serves every device, and the CPU where the native library is missing or switched off.
        native_cpu: calls the native library; same arguments.
        fake: same arguments, empty results.
        accepts: same arguments; whether the native library handles this dtype and block size.
    """
    name = schema.partition("(")[0]

    def on_cpu(*args: Any) -> Any:
        chosen = native_cpu if native.available() and accepts(*args) else reference
        return chosen(*args)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"entrenar::{name}", fake, lib=_LIBRARY)


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """Register the gradient of the operation `name`; see torch.library.register_autograd."""
    torch.library.register_autograd(f"entrenar::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
