"""Whether Triton's kernels serve on a GPU (ops/*_gpu.py), and on which one they run.

Triton comes with torch's builds for CUDA and no other; the modules that import it are imported when a kernel is first
needed.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from entrenar.ops import native

_LOG = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Whether Triton is there and compiles on this machine; tried once, on a few elements."""
    if native.asks_for_reference() or find_spec("triton") is None:
        _LOG.info("PyTorch's operations serve on the GPU: Triton is missing or switched off")
        return False
    try:
        from entrenar.ops.elementwise_gpu import rms_norm

        some = torch.ones(1, 16, device="cuda")
        rms_norm(some, some[0], 1e-6, 0.0)
    except Exception as error:  # whatever a compiler that is missing or broken raises
        _LOG.warning("Triton cannot compile here (%s): PyTorch's operations, which are slower, serve on the GPU", error)
        return False
    return True


def where_it_is(x: Tensor) -> AbstractContextManager[object]:
    """Launch on the GPU that holds x, which need not be the current one."""
    current = x.device.index is None or x.device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(x.device)
