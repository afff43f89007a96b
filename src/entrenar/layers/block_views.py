"""The residual blocks as csrc/block takes them."""

import ctypes
from collections.abc import Mapping

from torch import Tensor

from entrenar import native
from entrenar.layers.adapted_native import MemberView


class BufferView(ctypes.Structure):
    """csrc/block/block.h's BufferView."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class NormView(ctypes.Structure):
    """csrc/block/block.h's NormView."""

    _fields_ = (
        ("weight", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("dtype", ctypes.c_int32), ("eps", ctypes.c_float),
        ("offset", ctypes.c_float), ("unused", ctypes.c_int32),
    )  # fmt: skip


class MlpView(ctypes.Structure):
    """csrc/block/mlp.cpp's MlpBlockView."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "inner")), ("norm", NormView),
        *((name, BufferView) for name in ("h", "x", "gate", "up", "product", "u", "down_u", "out", "dh")),
        ("members", MemberView * 3), ("activation", ctypes.c_int32), ("unused", ctypes.c_int32),
    )  # fmt: skip


class AttentionView(ctypes.Structure):
    """csrc/block/attention.cpp's AttentionBlockView."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "hidden", "heads", "kv_heads", "width")),
        *((name, NormView) for name in ("norm", "q_norm", "k_norm")),
        *((name, BufferView) for name in ("h", "x", "q", "k", "v", "o", "lse", "u", "output_u", "out", "dh")),
        *((name, BufferView) for name in ("cos", "sin")),
        ("rotary_batches", ctypes.c_int64), ("rotated", ctypes.c_int64), ("starts", BufferView),
        ("members", MemberView * 4), ("scale", ctypes.c_float), ("rotary_dtype", ctypes.c_int32),
    )  # fmt: skip


def set_buffers(view: ctypes.Structure, tensors: Mapping[str, Tensor | None]) -> None:
    """Let a view's buffers of these names be these tensors."""
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(view, name, tuple(native.buffer(tensor)))
