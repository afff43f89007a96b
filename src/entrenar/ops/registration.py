"""The `entrenar` namespace of torch.library: how an operation of this room is registered.

Each operation has a schema, a PyTorch reference that runs on any device, a native CPU implementation that gives the
same bits (the same to rounding where it sums or takes exponentials), perhaps a GPU kernel that does too, a fake (what
shapes come out, for torch.compile), and where it is differentiable an autograd formula.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrenar import native
from entrenar.ops import gpu_kernels
from entrenar.ops.gpu_kernels import GpuKernel

_LIBRARY = torch.library.Library("entrenar", "DEF")


@dataclass
class _Operation:
    """What serves a plain call: `compute` without a gradient, `function` with one (None: there is none)."""

    compute: Callable[..., Any]
    reference: Callable[..., Any]
    gpu: GpuKernel | None
    function: type[torch.autograd.Function] | None = None


_OPERATIONS: dict[str, _Operation] = {}


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    native_cpu: Callable[..., Any],
    fake: Callable[..., Any],
    accepts: Callable[..., bool],
    gpu: GpuKernel | None = None,
) -> None:
    """Register one operation.

    Args:
        schema: `name(Tensor x, …) -> Tensor`.
        reference: plain PyTorch; serves every device, and the CPU where the native library is missing or switched off.
        native_cpu: calls the native library; same arguments.
        fake: same arguments, empty results.
        accepts: same arguments; whether the kernels handle this dtype and block size.
        gpu: a Triton kernel. None: the reference serves on a GPU, as it does where Triton cannot.
    """
    name = schema.partition("(")[0]

    def on_cpu(*args: Any) -> Any:
        chosen = native_cpu if native.available() and accepts(*args) else reference
        return chosen(*args)

    def on_gpu(*args: Any) -> Any:
        if gpu is not None and accepts(*args) and gpu_kernels.serves(name, gpu, reference, args, accepts):
            return gpu.run(*args)
        return reference(*args)

    on = {"cpu": on_cpu, "cuda": on_gpu}

    def compute(*args: Any) -> Any:
        return on.get(args[0].device.type, reference)(*args)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"entrenar::{name}", fake, lib=_LIBRARY)
    _OPERATIONS[name] = _Operation(compute, reference, gpu)


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """Register the gradient of the operation `name`; see torch.library.register_autograd."""
    torch.library.register_autograd(f"entrenar::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    operation = _OPERATIONS[name]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = operation.compute(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return backward(ctx, *grads)

    operation.function = Function


def call(name: str, x: Tensor, *args: Any) -> Any:
    """Run an operation that changes none of its arguments, the first of which is a tensor.

    Whoever traces or intercepts gets it from torch.library; anybody else gets the same without that dispatch, which
    costs 80 µs with a gradient: more than the work of a small layer.
    """
    if not native.is_plain(x):
        return getattr(torch.ops.entrenar, name)(x, *args)
    operation = _OPERATIONS[name]
    wants_gradient = torch.is_grad_enabled() and any(
        isinstance(arg, Tensor) and arg.requires_grad for arg in (x, *args)
    )
    if operation.function is None or not wants_gradient:
        return operation.compute(x, *args)
    return operation.function.apply(x, *args)


def compute(name: str, x: Tensor, *args: Any) -> Any:
    """The same without a gradient, inside an autograd function."""
    return _OPERATIONS[name].compute(x, *args) if native.is_plain(x) else getattr(torch.ops.entrenar, name)(x, *args)
