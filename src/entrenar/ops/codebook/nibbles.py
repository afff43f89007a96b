"""Two 4-bit codes a byte: the even element in the high nibble, the odd one in the low (bitsandbytes' order)."""

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor, spare: int = 0) -> Tensor:
    """Pack codes (n,) uint8 in 0…15 into ceil(n/2) bytes; an odd count leaves `spare` in the last low nibble."""
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=spare)
    return (codes[::2] << 4) | codes[1::2]


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Undo `pack_nibbles`: packed (ceil(count/2),) uint8 → codes (count,) uint8."""
    return torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count]
