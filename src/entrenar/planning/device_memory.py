"""Memory where a model computes: of a CPU this process's anonymous bytes, of a GPU what torch has given out there."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

import torch

from entrenar.core.memory import PeakMemory, anonymous_bytes, available_bytes


class Peak(Protocol):
    """What was held at most, bytes, once the block that was watched is left."""

    peak: int


def used_bytes(device: torch.device) -> int:
    """What this process holds on the device; on a GPU without CUDA's own context, which is not ours to plan."""
    return anonymous_bytes() if device.type == "cpu" else torch.cuda.memory_allocated(device)


def free_bytes(device: torch.device) -> int | None:
    """What this process can take beside that; None where nothing says."""
    if device.type == "cpu":
        return available_bytes()
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable


def peak_memory(device: torch.device) -> AbstractContextManager[Peak]:
    """Watch a block for the peak of `used_bytes`."""
    return PeakMemory() if device.type == "cpu" else _GpuPeak(device)


class _GpuPeak:
    """Torch counts for itself, so nothing needs to sample."""

    def __init__(self, device: torch.device) -> None:
        self.peak, self._device = 0, device

    def __enter__(self) -> Peak:
        torch.cuda.init()  # the counters are there only then
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.peak = torch.cuda.max_memory_allocated(self._device)
