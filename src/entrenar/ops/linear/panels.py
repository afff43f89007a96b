"""Products with a weight that is decoded a panel at a time, into a scratch that stays in cache, for torch's matmul.

For dtypes and devices that the native product (ops/linear/multiply.py), which decodes inside, does not take.
Letters: B tokens, O out_features, I in_features.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_BYTES = 3 << 20
_PANEL_MULTIPLE = 64  # narrower panels, or odd ones, are slow in torch's matmul
_scratch = threading.local()


def panel_step(lines: int, line_bytes: int) -> int:
    """How many of `lines` lines of a weight make a panel; the panels are about equally large."""
    fitting = max(PANEL_BYTES // max(line_bytes, 1), 1)
    panels = -(-lines // fitting)
    equal = -(-lines // max(panels, 1))
    return max(-(-equal // _PANEL_MULTIPLE) * _PANEL_MULTIPLE, 1)


def scratch_for(count: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor in this thread's scratch, which grows as needed and is never given back."""
    needed = count * dtype.itemsize
    if getattr(_scratch, "raw", None) is None or _scratch.raw.numel() < needed:
        with torch.inference_mode(False):
            _scratch.raw = torch.empty(needed, dtype=torch.uint8)
    return _scratch.raw[:needed].view(dtype)


@dataclass(frozen=True)
class RowPanels:
    """A frozen weight (O, I) and how rows of it are decoded.

    Attributes:
        decode: (rows, dtype) → those rows of the weight, (n, I), valid until the next call.
        multiple: a panel is a multiple of so many rows.
    """

    shape: tuple[int, int]
    decode: Callable[[slice, torch.dtype], Tensor]
    multiple: int = 1

    @torch.no_grad()
    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X (B, I), bias (O,) of x's dtype → x·Wᵀ + bias (B, O). No gradient is recorded."""
        if x.device.type != "cpu":  # whose matmul wants the whole weight
            return F.linear(x, self.decode(slice(0, self.shape[0]), x.dtype), bias)
        y = x.new_empty(len(x), self.shape[0])
        for rows in self._panels(x.dtype):
            weight = self.decode(rows, x.dtype)
            if bias is None:
                torch.mm(x, weight.t(), out=y[:, rows])
            else:
                torch.addmm(bias[rows], x, weight.t(), out=y[:, rows])
        return y

    @torch.no_grad()
    def transposed_product(self, grad: Tensor) -> Tensor:
        """Grad (B, O) → grad·W (B, I); panels are summed in float32 at least."""
        if grad.device.type != "cpu":
            return grad @ self.decode(slice(0, self.shape[0]), grad.dtype)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(len(grad), self.shape[1], dtype=dtype)
        for rows in self._panels(grad.dtype):
            weight = self.decode(rows, grad.dtype)
            if dtype == grad.dtype:
                total.addmm_(grad[:, rows], weight)
            else:
                total += grad[:, rows] @ weight
        return total.to(grad.dtype)

    def _panels(self, dtype: torch.dtype) -> Iterator[slice]:
        rows, columns = self.shape
        step = -(-panel_step(rows, columns * dtype.itemsize) // self.multiple) * self.multiple
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))
