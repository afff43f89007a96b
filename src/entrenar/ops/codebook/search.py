"""4-bit block quantization with a codebook of 16 values, each block's scale chosen for the least squared error.

An element's error counts by its magnitude, w = |x| / max|x|: least squares alone clips the large weights that a model
depends on most, and its loss rises although the error falls (docs/performance.md).

For codes c the best scale is Σwxc / Σwcc, and the block's error is then Σwxx − (Σwxc)² / Σwcc; for a scale s the best
codes are the nearest entries of x / s. Candidates are shares of the block's largest magnitude with either sign (a
negative scale turns the codebook around, and NF4 has an entry more above 0 than below); the best one's least-squares
scale is kept, and improved once more. The decoder does not change: value = codebook[code] · scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from entrenar import native
from entrenar.native import abi
from entrenar.ops.blocks import block_count, chunks
from entrenar.ops.codebook.nibbles import pack_nibbles
from entrenar.ops.codebook.quantize import empty_codes, takes_codebook
from entrenar.ops.registration import call, define

# csrc/codebook4/search.h has the same shares and the same smallest magnitude; tests compare every path with this.
SHARES = (0.84, 0.94, 1.04)
(_SUM_LANES,) = abi.constants("kSumLanes")
_SMALLEST = 2.0**-100

_search = native.Function("search_codebook")


def search_codebook(flat: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales; arguments and results as in ops/codebook/quantize.py, but scales of either sign."""
    return call("search_codebook", flat, codebook, block_size)


def _reference(flat: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    count = flat.numel()
    padded = _whole_blocks(flat, block_size)
    order = torch.argsort(codebook, stable=True)
    values = codebook[order]
    midpoints = (values[:-1] + values[1:]) / 2
    codes = torch.empty(padded.numel(), dtype=torch.uint8, device=flat.device)
    scales = torch.empty(padded.numel() // block_size, device=flat.device)
    for part in chunks(padded.numel(), block_size, padded.device):
        blocks = padded[part].float().view(-1, block_size)
        best_scales = _search_blocks(blocks, values, midpoints)
        scales[part.start // block_size : part.stop // block_size] = best_scales
        reciprocal = torch.where(blocks.abs().amax(1) >= _SMALLEST, 1.0 / best_scales, 0.0)
        at = torch.bucketize(blocks * reciprocal[:, None], midpoints, out_int32=True)
        codes[part] = order.to(torch.uint8)[at].flatten()
    return pack_nibbles(codes[: count + count % 2], spare=0), scales


def _search_blocks(blocks: Tensor, values: Tensor, midpoints: Tensor) -> Tensor:
    """blocks (n, block size) float32 → scales (n,)."""
    largest = blocks.abs().amax(1)
    weights = blocks.abs() * (1.0 / largest)[:, None]
    best, scale = torch.full_like(largest, -1.0), largest.clone()
    for share in SHARES:
        for candidate in (largest * share, -(largest * share)):
            _consider(blocks, weights, values, midpoints, candidate, best, scale)
    _consider(blocks, weights, values, midpoints, scale.clone(), best, scale)
    usable = (largest >= _SMALLEST) & largest.isfinite()
    return torch.where(usable, scale, largest)


def _consider(
    blocks: Tensor,
    weights: Tensor,
    values: Tensor,
    midpoints: Tensor,
    candidate: Tensor,
    best: Tensor,
    scale: Tensor,
) -> None:
    """Take over the candidate's codes' least-squares scale where they gain more than the best so far."""
    c = values[torch.bucketize(blocks * (1.0 / candidate)[:, None], midpoints, out_int32=True)]
    weighted = weights * c
    xc, cc = _sum(blocks * weighted), _sum(c * weighted)
    gain = xc * xc / cc
    better = gain > best
    best[better], scale[better] = gain[better], (xc / cc)[better]


def _sum(values: Tensor) -> Tensor:
    """Row sums (n,) in the order of the native kernels: eight lanes, then pairwise."""
    lanes = values.view(len(values), -1, _SUM_LANES)
    total = torch.zeros_like(lanes[:, 0])
    for step in range(lanes.shape[1]):
        total = total + lanes[:, step]
    four = total[:, :4] + total[:, 4:]
    two = four[:, :2] + four[:, 2:]
    return two[:, 0] + two[:, 1]


def _whole_blocks(flat: Tensor, block_size: int) -> Tensor:
    """Zeros behind the last block: they change neither its scale nor the codes before them."""
    missing = -flat.numel() % block_size
    return F.pad(flat, (0, missing)) if missing else flat


def _native(flat: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    padded = _whole_blocks(flat.contiguous(), block_size)
    codes, scales = empty_codes(padded, codebook, block_size)
    _search(
        padded, codebook.contiguous(), codes, scales,
        padded.numel(), block_size, native.DTYPES[flat.dtype], native.threads(),
    )  # fmt: skip
    return codes[: block_count(flat.numel(), 2)].clone() if padded is not flat else codes, scales


define(
    "search_codebook(Tensor flat, Tensor codebook, int block_size) -> (Tensor, Tensor)",
    reference=_reference,
    native_cpu=_native,
    fake=empty_codes,
    accepts=takes_codebook,
)
