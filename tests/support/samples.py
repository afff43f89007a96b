"""Weights that are hard on a kernel: their shapes, their values, and tensors that lie awkwardly in memory."""

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COUNTS = (0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 1000, 4304, 40_001)
BLOCK_SIZES = (16, 32, 64, 256, 4096)


def gaussian(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adversarial(dtype: torch.dtype) -> dict[str, Tensor]:
    """Named weights of 200 elements: three blocks of 64 and a partial one."""
    info = torch.finfo(dtype)
    denormal = torch.tensor(info.smallest_normal, dtype=dtype) * 2.0**-5
    outlier = torch.zeros(200, dtype=dtype)
    outlier[[70, 199]] = torch.tensor([info.max, -3.0], dtype=dtype)
    signs = torch.ones(200).where(gaussian(200) > 0, -1.0).to(dtype)
    return {
        "zeros": torch.zeros(200, dtype=dtype),
        "signed zeros": signs * 0.0,
        "denormals": gaussian(200, dtype) * denormal,
        "the smallest denormal": signs * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
        "plus and minus the largest": signs * info.max,
        "one outlier among zeros": outlier,
        "every magnitude": torch.exp2(torch.linspace(-130, 127, 200)).clamp(max=info.max).to(dtype) * signs,
        "ties": torch.arange(200, dtype=torch.float32).sub(100).div(64).to(dtype),
    }


def unaligned(tensor: Tensor, offset: int = 1) -> Tensor:
    """A copy whose address is `offset` bytes past an aligned one."""
    raw = np.zeros(tensor.numel() * tensor.element_size() + 64 + offset, dtype=np.uint8)
    start = -raw.ctypes.data % 64 + offset
    view = raw[start : start + tensor.numel() * tensor.element_size()]
    view[:] = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    bits = {1: np.uint8, 2: np.int16, 4: np.int32}[tensor.element_size()]
    return torch.from_numpy(view.view(bits)).view(tensor.dtype).view(tensor.shape)


def awkward(tensor: Tensor) -> list[Tensor]:
    """Tensors equal to this one: unaligned, with gaps between its rows, between its elements, transposed."""
    rows, elements = tensor.repeat_interleave(2, 0)[::2], tensor.repeat_interleave(2, -1)[..., ::2]
    return [unaligned(tensor), rows, elements, tensor.transpose(0, -1).contiguous().transpose(0, -1)]
