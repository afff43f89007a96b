"""How many bytes a process may hold where the model computes."""

import torch

from entrenar.planning.device_memory import free_bytes, used_bytes
from entrenar.planning.settings import MemorySettings

_USABLE = 0.9  # of what is available: the estimate is not exact, and other processes live on the machine


def memory_budget(settings: MemorySettings, device: torch.device) -> int | None:
    """Bytes in all; None where nothing says."""
    if isinstance(settings.memory, int):
        return settings.memory
    free = free_bytes(device)
    return None if free is None else round(_USABLE * (free + used_bytes(device)))


def budget_words(settings: MemorySettings, device: torch.device) -> str:
    """Where the budget comes from, for a message."""
    where = "machine" if device.type == "cpu" else "GPU"
    return "training.memory allows" if isinstance(settings.memory, int) else f"this {where} has only"
