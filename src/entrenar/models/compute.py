"""The dtype a machine computes in: bfloat16 where it is native, else float32."""

import torch

from entrenar.core.errors import InputError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def native_dtype() -> torch.dtype:
    """bfloat16 on a CPU with AVX512-BF16 or AMX (or on a GPU that has it), else float32.

    Elsewhere bfloat16's products are made of float32 ones: that saves memory, hardly time, and rounds more.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_dot() else torch.float32


def _has_bf16_dot() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_dtype(name: str) -> torch.dtype:
    """`auto`, `float32`, `bfloat16` or `float16` → torch dtype."""
    if name == "auto":
        return native_dtype()
    if name not in _DTYPES:
        raise InputError(f"unknown dtype {name!r}: choose auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]
