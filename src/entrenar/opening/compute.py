"""Where a model computes, and in which dtype: on a GPU if there is one, in bfloat16 where that is native."""

import re

import torch

from entrenar.core.errors import InputError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = r"auto|cpu|cuda(:\d+)?"
_FIRST_BFLOAT16 = (8, 0)  # compute capability of Ampere; older GPUs emulate it


def resolve_device(name: str) -> torch.device:
    """`auto` (the first GPU that torch sees, else the CPU), `cpu`, `cuda` or `cuda:N` → torch device.

    Raises:
        InputError: another name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(DEVICES, name):
        raise InputError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
    if index >= count:
        raise InputError(f"device {name} is not there, torch sees {count} GPUs: choose auto or cpu")
    return torch.device("cuda", index)


def native_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a CPU with AVX512-BF16 or AMX, or on a GPU that has it, else float32.

    Elsewhere bfloat16's products are made of float32 ones: that saves memory, hardly time, and rounds more.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= _FIRST_BFLOAT16
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_dot()
    return torch.bfloat16 if native else torch.float32


def _has_bf16_dot() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`, `float32`, `bfloat16` or `float16` → torch dtype."""
    if name == "auto":
        return native_dtype(device)
    if name not in _DTYPES:
        raise InputError(f"unknown dtype {name!r}: choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
