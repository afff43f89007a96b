"""GGUF's blocks back to numbers in plain PyTorch, on any device: (n, bytes of a block) uint8 → (n, elements) float32.

Layouts and the order of the float32 operations are ggml's (`ggml-quants.c`, `dequantize_row_*`), so that the values
are the `gguf` package's to the last bit. Letters: n blocks; a K type's block has sub-blocks of 16 or 32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
Decoder = Callable[[Tensor], Tensor]


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, (n, 1) float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _bits(values: Tensor, shifts: Sequence[int], mask: int) -> Tensor:
    """Uint8 (n, …, k) → (n, …, shifts, k): the masked bits at each shift."""
    shift = torch.tensor(shifts, dtype=torch.uint8, device=values.device)
    return (values.unsqueeze(-2) >> shift[:, None]) & mask


def _nibbles(blocks: Tensor) -> Tensor:
    """(n, 16) bytes → (n, 32): all low nibbles, then all high ones."""
    return _bits(blocks, (0, 4), 15).flatten(1)


def _fifth_bits(blocks: Tensor) -> Tensor:
    """(n, 4) bytes → (n, 32): bit by bit, shifted to where it belongs in a 5-bit code."""
    shift = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (((blocks.unsqueeze(-1) >> shift) & 1) << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    values = torch.tensor(_IQ4_NL, dtype=torch.float32, device=blocks.device)
    return _half(blocks, 0) * values[_nibbles(blocks[:, 2:]).int()]


def _scaled(scales: Tensor, codes: Tensor, minima: Tensor | None = None) -> Tensor:
    """scale · code − minimum of every sub-block: scales, minima (n, sub-blocks), codes (n, 256)."""
    values = scales.unsqueeze(-1) * codes.reshape(*scales.shape, -1).float()
    return (values if minima is None else values - minima.unsqueeze(-1)).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, codes = blocks[:, :16], _bits(blocks[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3)
    return _scaled(_half(blocks, 80) * (scales & 15).float(), codes, _half(blocks, 82) * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).flatten(1)
    high = _bits(blocks[:, :32], range(8), 1).flatten(1) << 2
    packed = blocks[:, 96:108]
    scales = _bits(packed[:, :8], (0, 4), 15).flatten(1) | _bits(packed[:, 8:], (0, 2, 4, 6), 3).flatten(1) << 4
    return _scaled(_half(blocks, 108) * (scales.float() - 32), (low | high).float() - 4)


def _six_bit_pairs(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and eight minima of q4_k and q5_k, (n, 8) float32 each, times their block's own."""
    first, second, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (high & 15) | ((first >> 6) << 4)), 1)
    minima = torch.cat((second & 63, (high >> 4) | ((second >> 6) << 4)), 1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bit_pairs(blocks)
    return _scaled(scales, _bits(blocks[:, 16:].reshape(-1, 4, 32), (0, 4), 15), minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bit_pairs(blocks)
    low = _bits(blocks[:, 48:].reshape(-1, 4, 32), (0, 4), 15).flatten(1)
    return _scaled(scales, low | _bits(blocks[:, 16:48], range(8), 1).flatten(1) << 4, minima)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, :128].reshape(-1, 2, 64), (0, 4), 15).flatten(1)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).flatten(1)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(_half(blocks, 208) * scales, (low | high << 4).float() - 32)


DECODERS: dict[str, Decoder] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "q2_k": _q2_k, "q3_k": _q3_k,
    "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "iq4_nl": _iq4_nl,
}  # fmt: skip
