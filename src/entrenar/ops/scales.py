"""Block scales in 8 bits, and back (double quantization, QLoRA, Dettmers et al. 2023, section 3).

One float32 for each group of 256 blocks, and one byte a block:
- `dynamic` (bitsandbytes): scale = map[byte] · group absmax + offset;
- `linear`: scale = byte / 255 · group maximum.

Other operations take scales as a list of tensors, which says how they are held:
[scales (blocks,) float32]; [bytes (blocks,), group (groups,) float32]; [bytes, group, offset (1,), map (256,)].
"""

import torch
from torch import Tensor

from entrenar import native
from entrenar.native import abi
from entrenar.ops.blocks import block_absmax, block_count
from entrenar.ops.registration import call, define

(GROUP,) = abi.constants("kScaleGroup")

_nest = native.Function("nest_scales")
_decode = native.Function("decode_scales")


def nest_scales(scales: Tensor, offset: Tensor | None = None, dynamic_map: Tensor | None = None) -> list[Tensor]:
    """Hold scales (blocks,) float32 in 8 bits: [bytes (blocks,) uint8, group (groups,) float32].

    Args:
        offset: (1,) float32 and dynamic_map: (256,) float32, ascending, for `dynamic`; neither for `linear`, whose
            scales are not negative.
    """
    return list(call("nest_scales", scales, offset, dynamic_map))


def decode_scales(scales: list[Tensor]) -> Tensor:
    """The float32 scale of every block, (blocks,), from whichever way they are held."""
    return scales[0] if len(scales) == 1 else torch.ops.entrenar.decode_scales(scales)


def scale_buffers(scales: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The four buffers of csrc/scales/scales.h."""
    contiguous = [part.contiguous() for part in scales]
    return (*contiguous, *[None] * (4 - len(contiguous)))


def _nest_reference(scales: Tensor, offset: Tensor | None, dynamic_map: Tensor | None) -> tuple[Tensor, Tensor]:
    centred = scales if offset is None else scales - offset
    group = block_absmax(centred, GROUP)
    spread = group.repeat_interleave(GROUP)[: scales.numel()]
    if dynamic_map is None:
        codes = (centred / spread * 255).round()
    else:
        codes = _dynamic_codes(centred * (1.0 / spread), dynamic_map)
    return torch.where((spread > 0) & spread.isfinite(), codes, 0).to(torch.uint8), group


def _dynamic_codes(scaled: Tensor, dynamic_map: Tensor) -> Tensor:
    """Nearest entries of the dynamic map to scaled (n,) float32 in [−1, 1].

    bitsandbytes' CPU kernel first rounds to a grid of 65,536 steps, by one fused multiply-add; the float64 arithmetic
    below gives the same bits.
    """
    shifted = scaled.clamp(-1, 1) + 1
    step = (shifted.double() * 0.5 * 65535 + 0.5).float().to(torch.int32)
    grid = -1.0 + (2.0 * step.float()) / 65535
    return torch.bucketize(grid, 0.5 * (dynamic_map[:-1] + dynamic_map[1:]), out_int32=True)


def _decode_reference(scales: list[Tensor]) -> Tensor:
    codes, group = scales[0], scales[1].repeat_interleave(GROUP)[: scales[0].numel()]
    if len(scales) == 2:
        return codes.float() / group.new_tensor([255.0]) * group  # by a number a GPU would multiply with its reciprocal
    return scales[3][codes.long()] * group + scales[2]


def _nest_native(scales: Tensor, offset: Tensor | None, dynamic_map: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, group = _nest_fake(scales, offset, dynamic_map)
    _nest(scales.contiguous(), offset, dynamic_map, codes, group, scales.numel(), native.threads())
    return codes, group


def _decode_native(scales: list[Tensor]) -> Tensor:
    out = _decode_fake(scales)
    _decode(*scale_buffers(scales), out, out.numel(), native.threads())
    return out


def _nest_fake(scales: Tensor, offset: Tensor | None, dynamic_map: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    groups = block_count(scales.numel(), GROUP)
    return torch.empty_like(scales, dtype=torch.uint8), scales.new_empty(groups)


def _decode_fake(scales: list[Tensor]) -> Tensor:
    return torch.empty_like(scales[0], dtype=torch.float32)


define(
    "nest_scales(Tensor scales, Tensor? offset, Tensor? dynamic_map) -> (Tensor, Tensor)",
    reference=_nest_reference,
    native_cpu=_nest_native,
    fake=_nest_fake,
    accepts=lambda scales, _offset, _map: scales.dtype == torch.float32,
)
define(
    "decode_scales(Tensor[] scales) -> Tensor",
    reference=_decode_reference,
    native_cpu=_decode_native,
    fake=_decode_fake,
    accepts=lambda _scales: True,
)
