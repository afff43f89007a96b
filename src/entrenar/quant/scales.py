"""How block scales are held: float32 as raw bytes, or quantized once more to 8 bits (double quantization).

Scales are kept as uint8 so that no mixed-precision policy can round them. Exactly one copy is held.
Double quantization, for one group of 256 blocks each:
- `dynamic` (bitsandbytes): scale = map[u8] · group absmax + offset, offset = mean of all scales;
- `linear` (int4): scale = u8 / 255 · group maximum.
"""

import torch
from torch import Tensor

from entrenar.ops.blocks import block_absmax
from entrenar.quant.codebooks import dynamic_map

GROUP = 256
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


def nest_dynamic(scales: Tensor) -> Parts:
    """Double quantization with bitsandbytes' dynamic map and offset. scales (blocks,) float32."""
    offset = scales.mean() if scales.numel() else scales.new_zeros(())
    centred = scales - offset
    group_absmax = block_absmax(centred, GROUP)
    spread = group_absmax.repeat_interleave(GROUP)[: scales.numel()]
    codes = torch.where(spread > 0, _dynamic_codes(centred * (1.0 / spread)), 0)
    return {
        "scales": codes.to(torch.uint8),
        "nested_scales": as_bytes(group_absmax),
        "offset": as_bytes(offset.view(1)),
    }


def _dynamic_codes(scaled: Tensor) -> Tensor:
    """Nearest entries of the dynamic map to scaled (n,) float32 in [−1, 1].

    bitsandbytes' CPU kernel first rounds to a grid of 65,536 steps, by one fused multiply-add; the float64 arithmetic
    below gives the same bits.
    """
    shifted = scaled.clamp(-1, 1) + 1
    step = (shifted.double() * 0.5 * 65535 + 0.5).float().to(torch.int32)
    grid = -1.0 + (2.0 * step.float()) / 65535
    code = dynamic_map(scaled.device)
    return torch.bucketize(grid, 0.5 * (code[:-1] + code[1:]), out_int32=True)


def nest_linear(scales: Tensor) -> Parts:
    """Double quantization of non-negative scales: round(s / max · 255), one float32 maximum per group."""
    group_maximum = block_absmax(scales, GROUP)
    spread = group_maximum.repeat_interleave(GROUP)[: scales.numel()]
    codes = torch.where(spread > 0, scales / spread * 255, 0.0).round()
    return {"scales": codes.to(torch.uint8), "nested_scales": as_bytes(group_maximum)}


def block_scales(parts: Parts) -> Tensor:
    """The float32 scale of every block, (blocks,), from whichever way they are held."""
    if "nested_scales" not in parts:
        return as_float(parts["scales"])
    codes = parts["scales"]
    group = as_float(parts["nested_scales"]).repeat_interleave(GROUP)[: codes.numel()]
    if "offset" not in parts:
        return codes.float() / 255 * group
    offset = as_float(parts["offset"])
    return dynamic_map(codes.device)[codes.long()] * group + offset if codes.numel() else group
