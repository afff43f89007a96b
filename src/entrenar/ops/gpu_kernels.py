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

from entrenar.ops import native

_LOG = logging.getLogger(__name__)
_TOLERANCE = 1e-4  # of float32 samples of the size of 1: another order of a sum, another exponential
_tried: dict[str, bool] = {}  # operation → whether its kernel serves


@dataclass(frozen=True)
class GpuKernel:
    """`run` takes an operation's arguments; `sample` makes some, float32 on the GPU, to try it with."""

    run: Callable[..., Any]
    sample: Callable[[], tuple[Any, ...]]


def serves(name: str, kernel: GpuKernel, reference: Callable[..., Any]) -> bool:
    """Whether an operation's kernel compiles here and agrees with its reference on the sample; tried once."""
    if name not in _tried:
        _tried[name] = _is_there() and _agrees(name, kernel, reference)
    return _tried[name]


@cache
def _is_there() -> bool:
    found = find_spec("triton") is not None and not native.asks_for_reference()
    if not found:
        _LOG.info("PyTorch's operations serve on the GPU: Triton is missing or switched off")
    return found


def _agrees(name: str, kernel: GpuKernel, reference: Callable[..., Any]) -> bool:
    try:
        found, expected = _after(kernel.run, kernel.sample()), _after(reference, kernel.sample())
    except Exception as error:  # whatever a compiler that is missing or broken raises
        _LOG.warning("Triton cannot compile %s here (%s): PyTorch's operations, which are slower, serve", name, error)
        return False
    pairs = zip(found, expected, strict=True)
    if all(torch.allclose(one, other, _TOLERANCE, _TOLERANCE) for one, other in pairs):
        return True
    _LOG.warning("Triton's %s gives wrong numbers here: PyTorch's operations, which are slower, serve", name)
    return False


def _after(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What a call gives, and what it leaves of its arguments, which it may write to."""
    made = function(*args)
    return [t for t in (*(made if isinstance(made, tuple) else (made,)), *args) if isinstance(t, Tensor)]


def numbers(*shape: int) -> Tensor:
    """Numbers of both signs for a sample, all different."""
    count = torch.Size(shape).numel()
    return torch.linspace(-2, 3, count, device="cuda").roll(count // 3).view(shape)


def where_it_is(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the GPU that holds x, which need not be the current one."""
    current = x.device.index is None or x.device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(x.device)
