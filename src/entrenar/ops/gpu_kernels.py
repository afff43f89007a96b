"""Triton's kernels (ops/*_gpu.py): which of them serve on this machine's GPU, and where they run.

Triton comes with torch's builds for CUDA and no other, and compiles at run time: the modules that import it are
imported when a kernel is first needed.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from entrenar import native

_LOG = logging.getLogger(__name__)
_TOLERANCE = 1e-4  # of samples of the size of 1: another order of a sum, another exponential
_ROUNDINGS = 4  # of the dtype
Arguments = tuple[Any, ...]
_tried: dict[Arguments, bool] = {}  # an operation and its arguments' dtypes → whether its kernel serves


@dataclass(frozen=True)
class GpuKernel:
    """`run` takes an operation's arguments; `samples` makes some to try it with, float32 where they are floats.

    One for each way in which the kernel is compiled, dtypes aside.
    """

    run: Callable[..., Any]
    samples: Callable[[torch.device], list[Arguments]]


def serves(
    name: str, kernel: GpuKernel, reference: Callable[..., Any], args: Arguments,
    accepts: Callable[..., bool] = lambda *_: True,
) -> bool:  # fmt: skip
    """Whether an operation's kernel compiles for the dtypes of `args` and agrees with its reference, every element, on
    samples in float32, where it `accepts` those, and in those dtypes; tried once.
    """
    key = (name, *map(_dtype, args))
    if key not in _tried:
        _tried[key] = are_there() and _agrees(name, kernel, reference, args, accepts)
    return _tried[key]


def _dtype(argument: Any) -> Any:
    return argument.dtype if isinstance(argument, Tensor) else argument if isinstance(argument, torch.dtype) else None


@cache
def are_there() -> bool:
    """Whether Triton is there to compile them, and the user has not switched them off."""
    serve = find_spec("triton") is not None and not native.asks_for_reference()
    if not serve:
        _LOG.info("PyTorch's operations serve on the GPU: Triton is missing or switched off")
    return serve


def _agrees(
    name: str, kernel: GpuKernel, reference: Callable[..., Any], args: Arguments, accepts: Callable[..., bool]
) -> bool:
    device = next(arg.device for arg in args if isinstance(arg, Tensor))

    def results(function: Callable[..., Any]) -> list[Tensor]:
        # As they are first: what the kernel computes is told in float32, bfloat16's roundings would hide much of it.
        samples = [arguments for arguments in kernel.samples(device) if accepts(*arguments)] + [
            _typed_like(arguments, args) for arguments in kernel.samples(device)
        ]
        return [tensor for sample in samples for tensor in _after(function, sample)]

    try:
        got, expected = results(kernel.run), results(reference)
    except Exception as error:  # whatever a compiler that is missing or broken raises
        _LOG.warning("Triton cannot compile %s here (%s): PyTorch's operations, which are slower, serve", name, error)
        return False
    if all(map(_close, got, expected)):
        return True
    _LOG.warning("Triton's %s gives wrong numbers here: PyTorch's operations, which are slower, serve", name)
    return False


def _after(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a call gives, and what it leaves of its arguments, which it may write to."""
    result = function(*args)
    return [t for t in (*(result if isinstance(result, tuple) else (result,)), *args) if isinstance(t, Tensor)]


def _typed_like(sample: Arguments, args: Arguments) -> Arguments:
    """The sample in the dtypes of other arguments of the same operation."""

    def typed(one: Any, other: Any) -> Any:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return one.to(other.dtype)
        return other if isinstance(one, torch.dtype) else one

    return tuple(map(typed, sample, args))


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = max(_TOLERANCE, _ROUNDINGS * torch.finfo(one.dtype).eps) if one.is_floating_point() else 0
    return torch.allclose(one, other, tolerance, tolerance)


def numbers(device: torch.device, *shape: int) -> Tensor:
    """Numbers of both signs for a sample, all different: float32."""
    count = torch.Size(shape).numel()
    return torch.linspace(-2, 3, count, device=device, dtype=torch.float32).roll(count // 3).view(shape)


def where_it_is(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the GPU that holds x, which need not be the current one."""
    current = x.device.index is None or x.device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(x.device)
