"""The codebooks, each written once.

NF4: 16 quantiles of a standard normal, normalised to [−1, 1], with an exact zero (QLoRA, Dettmers et al. 2023,
appendix E). FP4: sign, two exponent bits, one mantissa bit, normalised to 1. Dynamic map: 8-bit dynamic exponent (8-bit
Approximations for Parallelism in Deep Learning, Dettmers 2016), which bitsandbytes uses for the scales of scales.
INT4: two's complement.
"""

from functools import cache

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_POSITIVE = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
FP4 = (*_FP4_POSITIVE, *(-value for value in _FP4_POSITIVE))
INT4 = (*range(8), *range(-8, 0))


@cache
def codebook(name: str, device: torch.device) -> Tensor:
    """The 16 values of `nf4`, `fp4` or `int4` by code, (16,) float32."""
    return torch.tensor({"nf4": NF4, "fp4": FP4, "int4": INT4}[name], dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """bitsandbytes' signed dynamic map, ascending, (256,) float32.

    For each of seven decades 10^-6 … 10^0, 2^i midpoints of a linear grid on [0.1, 1], of both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        grid = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middle = 10 ** (exponent - 6) * ((grid[:-1] + grid[1:]) / 2)
        values += middle.tolist() + (-middle).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
