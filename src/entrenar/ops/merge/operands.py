"""What the merge operations share: how tensors are handed to csrc/merge, and the reference's difference x − base."""

from collections.abc import Sequence

import torch
from torch import Tensor

from entrenar import native


def difference(
    x: Tensor,  # (n,) any float dtype
    base: Tensor | None,  # (n,); None: zeros
) -> Tensor:
    """x − base in float32 (float64 where one of them is), as the kernels take it for magnitudes."""
    wide = torch.float64 if torch.float64 in (x.dtype, None if base is None else base.dtype) else torch.float32
    return x.to(wide) if base is None else x.to(wide) - base.to(wide)


def sum_dtype(out: Tensor) -> torch.dtype:
    """In what results are summed before they are rounded once: float32 for 16 bits, else float64."""
    return torch.float32 if out.dtype.itemsize == 2 else torch.float64


def is_native(*tensors: Tensor | None) -> bool:
    """Whether the native library serves these tensors; None is no hindrance."""
    return native.available() and all(
        tensor is None or (tensor.dtype in native.DTYPES and tensor.device.type == "cpu" and tensor.is_contiguous())
        for tensor in tensors
    )


def dtype_code(tensor: Tensor | None) -> int:
    """The kernels' number of a dtype."""
    return 0 if tensor is None else native.DTYPES[tensor.dtype]


def rows(tensors: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Tensor:
    """(n, 5) int64: address, bytes, dtype, address and bytes of the mask; the caller keeps the tensors alive."""
    table = []
    for tensor, mask in zip(tensors, masks or [None] * len(tensors), strict=True):
        where = (0, 0) if mask is None else (mask.data_ptr(), mask.numel())
        table.append((tensor.data_ptr(), tensor.nbytes, native.DTYPES[tensor.dtype], *where))
    return torch.tensor(table, dtype=torch.int64).view(-1, 5)
