"""Matrix products in float64 with a bound on rounding, and random weights in GGUF blocks."""

import gguf
import numpy as np
import torch
from torch import Tensor

from entrenar.ops.linear.gguf import FLOAT_TYPES, block_of

# Where the float16 scales (and minima) of a block stand.
_HALVES = {
    "q4_0": [(0, 2)], "q4_1": [(0, 2), (2, 4)], "q5_0": [(0, 2)], "q5_1": [(0, 2), (2, 4)], "q8_0": [(0, 2)],
    "iq4_nl": [(0, 2)], "q2_k": [(80, 82), (82, 84)], "q3_k": [(108, 110)], "q4_k": [(0, 2), (2, 4)],
    "q5_k": [(0, 2), (2, 4)], "q6_k": [(208, 210)],
}  # fmt: skip


def exact(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Σ A·B in float64, and the same of magnitudes."""
    value = sum(a.double() @ b.double() for a, b in pairs)
    size = sum(a.double().abs() @ b.double().abs() for a, b in pairs)
    assert isinstance(value, Tensor)
    assert isinstance(size, Tensor)
    return value, size


def assert_close(found: Tensor, value: Tensor, size: Tensor) -> None:
    rounding = 2.0**-8 if found.dtype == torch.bfloat16 else 2.0**-20
    assert ((found.double() - value).abs() <= rounding * size + 1e-30).all()


def packed_weight(type: str, rows: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Random bytes with scales of a sensible size, and the float32 matrix that the gguf package reads from them."""
    elements, size = block_of(type)
    generator = np.random.default_rng(rows * 100 + blocks)
    if elements == 1:
        values = torch.from_numpy(generator.standard_normal((rows, blocks * 32))).to(FLOAT_TYPES[type])
        return values.view(torch.uint8), values.float()
    raw = generator.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for first, last in _HALVES[type]:
        raw[..., first:last] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    raw = raw.reshape(rows, -1)
    return torch.from_numpy(raw), torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type.upper()]))
