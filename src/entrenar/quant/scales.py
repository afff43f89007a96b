"""How block scales are held: float32 as raw bytes, or quantized once more to 8 bits (double quantization).

Scales are kept as uint8 so that no mixed-precision policy can round them. Exactly one copy is held.
Double quantization, for one group of 256 blocks each:
- `dynamic` (bitsandbytes): scale = map[u8] · group absmax + offset, offset = mean of all scales;
- `linear` (int4): scale = u8 / 255 · group maximum.
"""

import torch
from torch import Tensor

from entrenar.ops.scales import GROUP, decode_scales, nest_scales
from entrenar.quant.codebooks import dynamic_map

__all__ = [
    "GROUP", "Parts", "as_bytes", "as_float", "block_scales", "hold_dynamic", "hold_linear", "nest_dynamic",
    "nest_linear", "plain", "scale_tensors",
]  # fmt: skip

Parts = dict[str, Tensor]


def as_bytes(values: Tensor) -> Tensor:
    """float32 (n,) → its 4·n bytes."""
    return values.float().contiguous().view(torch.uint8)


def as_float(raw: Tensor) -> Tensor:
    """4·n bytes → float32 (n,)."""
    return raw.view(torch.float32)


def plain(scales: Tensor) -> Parts:
    """Hold scales (blocks,) as they are."""
    return {"scales": as_bytes(scales)}


def hold_dynamic(scales: Tensor, double_quant: bool) -> Parts:
    """Plain, or nested as bitsandbytes does."""
    return nest_dynamic(scales) if double_quant else plain(scales)


def hold_linear(scales: Tensor, double_quant: bool) -> Parts:
    """Plain, or nested as 255ths of the largest."""
    return nest_linear(scales) if double_quant else plain(scales)


def nest_dynamic(scales: Tensor) -> Parts:
    """Double quantization with bitsandbytes' dynamic map and offset. scales (blocks,) float32."""
    offset = (scales.mean() if scales.numel() else scales.new_zeros(())).view(1)
    codes, group = nest_scales(scales, offset, dynamic_map(scales.device))
    return {"scales": codes, "nested_scales": as_bytes(group), "offset": as_bytes(offset)}


def nest_linear(scales: Tensor) -> Parts:
    """Double quantization of non-negative scales: round(s / max · 255), one float32 maximum per group."""
    codes, group = nest_scales(scales)
    return {"scales": codes, "nested_scales": as_bytes(group)}


def scale_tensors(parts: Parts) -> list[Tensor]:
    """The scales as the operations take them (ops/scales.py)."""
    if "nested_scales" not in parts:
        return [as_float(parts["scales"])]
    tensors = [parts["scales"], as_float(parts["nested_scales"])]
    return (
        tensors if "offset" not in parts else [*tensors, as_float(parts["offset"]), dynamic_map(parts["scales"].device)]
    )


def block_scales(parts: Parts) -> Tensor:
    """The float32 scale of every block, (blocks,), from whichever way they are held."""
    return decode_scales(scale_tensors(parts))
