"""Reference of the GGUF K quantizers (Q4_K, Q5_K, Q6_K): plain PyTorch, equal to csrc/gguf/k_*.h to the byte.

A super-block of 256 elements has sub-blocks with a scale each (and a minimum, in Q4_K and Q5_K), and these scales are
themselves small integers under a float16 unit. Three steps, the error weighted by (rms + |x|) · importance:
1. for each sub-block the best real scale and minimum: codes under many step widths, the least-squares fit to each;
2. the units so that the largest scale fits, and for each sub-block the best codes around its scale and minimum;
3. the units fitted again to all codes, step 2 again; kept where the error fell.

Sub-blocks lie in columns: x (elements of a sub-block, sub-blocks). Sums run in the order of the native kernels, and
every operation is rounded to float32 by itself. B super-blocks, L sub-blocks, G groups (sub-blocks) of a super-block.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SUPER_BLOCK = 256
_TINY = 1e-30  # a spread below this is none: float16 scales end at 6e-8
_SINGULAR = 1e-4  # a least-squares determinant below this share of its terms is noise
_LARGEST_F16 = 65504.0
_TOP_SCALE = 63  # of Q4_K and Q5_K


def quantize_q4_k(blocks: Tensor, importance: Tensor | None) -> Tensor:
    """Blocks (B, 256) float32, importance (B, 256) float32 or None → (B, 144) uint8."""
    units, codes = _affine(blocks, importance, 15)
    return torch.cat((units, _nibbles(codes, 32)), dim=1)


def quantize_q5_k(blocks: Tensor, importance: Tensor | None) -> Tensor:
    """Blocks (B, 256) float32, importance (B, 256) float32 or None → (B, 176) uint8."""
    units, codes = _affine(blocks, importance, 31)
    shifts = torch.arange(8, dtype=torch.uint8).view(8, 1)
    fifth = ((codes.view(-1, 8, 32) >> 4) << shifts).sum(dim=1, dtype=torch.uint8)
    return torch.cat((units, fifth, _nibbles(codes & 15, 32)), dim=1)


def quantize_q6_k(blocks: Tensor, importance: Tensor | None) -> Tensor:
    """Blocks (B, 256) float32, importance (B, 256) float32 or None → (B, 210) uint8."""
    x, weight = _columns(blocks, importance, 16)
    fitted = _round_symmetric(_search_symmetric(x, weight).view(-1, 16))
    fitted = _refine_symmetric(x, weight, fitted)
    fitted = fitted.or_better(_refine_symmetric(x, weight, _refit_symmetric(x, weight, fitted)))
    codes = _symmetric_codes(x, _signed_reciprocal((fitted.d * fitted.s).flatten())) + 32
    codes = codes.T.reshape(-1, SUPER_BLOCK).to(torch.uint8)
    pairs = (codes >> 4).view(-1, 2, 4, 32) << torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    high = pairs.sum(dim=2, dtype=torch.uint8).view(-1, 64)
    scales = fitted.s.to(torch.int8).view(torch.uint8)
    return torch.cat((_nibbles(codes & 15, 64), high, scales, _f16_bytes(fitted.d[:, :1])), dim=1)


@dataclass(frozen=True)
class _Fitted:
    """Units and codes of super-blocks with G groups: all (B, G) float32, d and dmin equal along a row."""

    d: Tensor
    dmin: Tensor
    s: Tensor
    m: Tensor
    error: Tensor

    def or_better(self, other: "_Fitted") -> "_Fitted":
        """Of each super-block the fit with the smaller error."""
        better = (_in_order(other.error.T) < _in_order(self.error.T)).view(-1, 1)
        parts = (torch.where(better, getattr(other, name), old) for name, old in vars(self).items())
        return _Fitted(*parts)


def _columns(blocks: Tensor, importance: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """x and its weights, each (size, L)."""
    x = blocks.reshape(-1, size).T.contiguous()
    rms = (_in_order(x * x) * (1.0 / size)).double().sqrt().float()  # torch's float32 sqrt is not correctly rounded
    weight = rms + x.abs()
    if importance is not None:
        weight = weight * importance.reshape(-1, size).T
    return x, weight


def _in_order(terms: Tensor) -> Tensor:
    """Sum over the first dimension, one term after another."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _smaller(a: Tensor, b: Tensor | float) -> Tensor:
    return torch.where(a < b, a, b)


def _larger(a: Tensor, b: Tensor | float) -> Tensor:
    return torch.where(a > b, a, b)


def _reciprocal(value: Tensor) -> Tensor:
    return torch.where(value > _TINY, 1.0 / value, 0.0)


def _signed_reciprocal(value: Tensor) -> Tensor:
    return torch.where(value.abs() > _TINY, 1.0 / value, 0.0)


def _storable(value: Tensor) -> Tensor:
    """The nearest float16, as float32; never infinite."""
    return _larger(_smaller(value, _LARGEST_F16), -_LARGEST_F16).half().float()


def _f16_bytes(values: Tensor) -> Tensor:
    return values.half().contiguous().view(torch.uint8)


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """Each `run` bytes hold that many elements in the low nibbles and the next ones in the high."""
    low, high = codes.view(-1, SUPER_BLOCK // (2 * run), 2, run).unbind(dim=2)
    return (low | (high << 4)).reshape(-1, SUPER_BLOCK // 2)


# --- Q4_K, Q5_K: x ≈ d·s·code − dmin·m ---


def _affine(blocks: Tensor, importance: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """The first 16 bytes of each super-block, and its codes (B, 256) uint8."""
    x, weight = _columns(blocks, importance, 32)
    scale, minimum = _search_affine(x, weight, top)
    fitted = _refine_affine(x, weight, _round_affine(scale.view(-1, 8), minimum.view(-1, 8)), top)
    fitted = fitted.or_better(_refine_affine(x, weight, _refit_affine(x, weight, fitted, top), top))
    codes = _affine_codes(x, (fitted.d * fitted.s).flatten(), (fitted.dmin * fitted.m).flatten(), top)
    s, m = fitted.s.to(torch.uint8), fitted.m.to(torch.uint8)
    low, high = slice(0, 4), slice(4, 8)
    packed = (
        s[:, low] | ((s[:, high] >> 4) << 6),
        m[:, low] | ((m[:, high] >> 4) << 6),
        (s[:, high] & 15) | ((m[:, high] & 15) << 4),
    )
    units = torch.cat((_f16_bytes(fitted.d[:, :1]), _f16_bytes(fitted.dmin[:, :1]), *packed), dim=1)
    return units, codes.T.reshape(-1, SUPER_BLOCK).to(torch.uint8)


def _search_affine(x: Tensor, weight: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Step 1: scale and minimum (to be subtracted), each (L,) and ≥ 0."""
    low, high = x.amin(dim=0).clamp(max=0), x.amax(dim=0)
    y, ceiling = x - low, -low  # against `low` as origin: far from zero, sums of x itself would cancel
    w, wy = _in_order(weight), _in_order(weight * y)
    per_spread = _reciprocal(high - low)
    best_scale, best_offset = torch.zeros_like(low), _smaller(wy / w, ceiling)
    best_gain = best_offset * (2.0 * wy - best_offset * w)  # one value for all, to be improved on
    for width in range(13):
        code = _smaller(y * (per_spread * (top - 2 + 0.25 * width)), float(top)).round()
        weighted = weight * code
        wl, wll, wly = _in_order(weighted), _in_order(weighted * code), _in_order(weighted * y)
        scale, offset = _fit_line(w, wy, wl, wll, wly, ceiling)
        gain = scale * (2.0 * wly - scale * wll - 2.0 * offset * wl) + offset * (2.0 * wy - offset * w)
        better = (gain > best_gain) & (scale > 0)
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)
        best_gain = torch.where(better, gain, best_gain)
    return best_scale, _larger(-(low + best_offset), 0.0)


def _fit_line(w: Tensor, wy: Tensor, wl: Tensor, wll: Tensor, wly: Tensor, ceiling: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of y ≈ scale·code + offset; through `ceiling` where the offset would pass it or codes are equal."""
    determinant = w * wll - wl * wl
    inverse = 1.0 / determinant
    scale, offset = (w * wly - wy * wl) * inverse, (wll * wy - wl * wly) * inverse
    usable = (determinant > _SINGULAR * (w * wll)) & (offset < ceiling)
    through = torch.where(wll > 0, (wly - ceiling * wl) / wll, 0.0)
    return torch.where(usable, scale, through), torch.where(usable, offset, ceiling)


def _affine_codes(x: Tensor, scale: Tensor, minimum: Tensor, top: int) -> Tensor:
    return _smaller(_larger((x + minimum) * _reciprocal(scale), 0.0), float(top)).round()


def _round_affine(scale: Tensor, minimum: Tensor) -> _Fitted:
    """Units from the largest scale and minimum of each super-block, and the nearest codes."""
    d = _storable(scale.amax(dim=1, keepdim=True) / _TOP_SCALE).expand_as(scale)
    dmin = _storable(minimum.amax(dim=1, keepdim=True) / _TOP_SCALE).expand_as(scale)
    s = _smaller(torch.where(d > 0, scale / d, 0.0), float(_TOP_SCALE)).round()
    m = _smaller(torch.where(dmin > 0, minimum / dmin, 0.0), float(_TOP_SCALE)).round()
    return _Fitted(d, dmin, s, m, torch.zeros_like(s))


def _refine_affine(x: Tensor, weight: Tensor, fitted: _Fitted, top: int) -> _Fitted:
    """Step 2: the best of s and m among their neighbours; s and m themselves win a tie."""
    best = replace(fitted, error=torch.full_like(fitted.s, torch.inf))
    for step in (4, 0, 1, 2, 3, 5, 6, 7, 8):
        s = (fitted.s + float(step // 3 - 1)).clamp(0, _TOP_SCALE)
        m = (fitted.m + float(step % 3 - 1)).clamp(0, _TOP_SCALE)
        scale, minimum = (fitted.d * s).flatten(), (fitted.dmin * m).flatten()
        off = scale * _affine_codes(x, scale, minimum, top) - minimum - x
        error = _in_order(weight * (off * off)).view_as(s)
        better = (error < best.error) if step != 4 else torch.ones_like(s, dtype=torch.bool)
        best = replace(
            best,
            s=torch.where(better, s, best.s),
            m=torch.where(better, m, best.m),
            error=torch.where(better, error, best.error),
        )
    return best


def _refit_affine(x: Tensor, weight: Tensor, fitted: _Fitted, top: int) -> _Fitted:
    """Step 3: d and dmin by least squares over each super-block; as they were where the equations are singular."""
    code = _affine_codes(x, (fitted.d * fitted.s).flatten(), (fitted.dmin * fitted.m).flatten(), top)
    weighted = weight * code
    terms = (weight, weight * x, weighted, weighted * code, weighted * x)
    w, wx, wl, wll, wlx = (_in_order(term).view_as(fitted.s) for term in terms)
    s, m = fitted.s, fitted.m
    aa, ab, bb = (_in_order(term.T) for term in (s * s * wll, s * m * wl, m * m * w))
    ax, bx = _in_order((s * wlx).T), _in_order((m * wx).T)
    determinant = aa * bb - ab * ab
    both = bb > 0
    solvable = torch.where(both, determinant > _SINGULAR * (aa * bb), aa > 0)
    d = torch.where(both, (bb * ax - ab * bx) / determinant, ax / aa)
    dmin = torch.where(both, (ab * ax - aa * bx) / determinant, 0.0)
    valid = (solvable & (d > 0) & (dmin >= 0)).view(-1, 1)
    return replace(
        fitted,
        d=torch.where(valid, _storable(d).view(-1, 1), fitted.d),
        dmin=torch.where(valid, _storable(dmin).view(-1, 1), fitted.dmin),
    )


# --- Q6_K: x ≈ d·s·code, code in −32…31 ---


def _symmetric_codes(x: Tensor, inverse: Tensor) -> Tensor:
    return _smaller(_larger(x * inverse, -32.0), 31.0).round()


def _search_symmetric(x: Tensor, weight: Tensor) -> Tensor:
    """Step 1: scale (L,). The first element of largest magnitude gets the negative end, which reaches one further."""
    extreme = x.gather(0, (x.abs() == x.abs().amax(dim=0)).to(torch.uint8).argmax(dim=0, keepdim=True)).squeeze(0)
    per_extreme = -_signed_reciprocal(extreme)
    best_scale, best_gain = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for width in range(12):
        code = _symmetric_codes(x, per_extreme * (24.0 + 0.75 * width))
        weighted = weight * code
        wll, wlx = _in_order(weighted * code), _in_order(weighted * x)
        scale = torch.where(wll > 0, wlx / wll, 0.0)
        better = scale * wlx > best_gain
        best_gain = torch.where(better, scale * wlx, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


def _round_symmetric(scale: Tensor) -> _Fitted:
    """Unit from the scale of largest magnitude of each super-block, which becomes −128, and the nearest codes."""
    size = scale.abs()
    first = (size == size.amax(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1, keepdim=True)
    d = _storable(scale.gather(1, first) / -128.0).expand_as(scale)
    s = _larger(_smaller(torch.where(d != 0, scale / d, 0.0), 127.0), -128.0).round()
    zero = torch.zeros_like(s)
    return _Fitted(d, zero, s, zero, zero)


def _refine_symmetric(x: Tensor, weight: Tensor, fitted: _Fitted) -> _Fitted:
    """Step 2: the best of s, s − 1, s + 1."""
    best = fitted
    for step in (0.0, -1.0, 1.0):
        s = (fitted.s + step).clamp(-128, 127)
        scale = (fitted.d * s).flatten()
        off = scale * _symmetric_codes(x, _signed_reciprocal(scale)) - x
        error = _in_order(weight * (off * off)).view_as(s)
        better = (error < best.error) if step else torch.ones_like(s, dtype=torch.bool)
        best = replace(best, s=torch.where(better, s, best.s), error=torch.where(better, error, best.error))
    return best


def _refit_symmetric(x: Tensor, weight: Tensor, fitted: _Fitted) -> _Fitted:
    """Step 3: d by least squares over each super-block; as it was where nothing is coded."""
    code = _symmetric_codes(x, _signed_reciprocal((fitted.d * fitted.s).flatten()))
    weighted = weight * code
    wll, wlx = (_in_order(term).view_as(fitted.s) for term in (weighted * code, weighted * x))
    aa, ax = _in_order((fitted.s * fitted.s * wll).T), _in_order((fitted.s * wlx).T)
    return replace(fitted, d=torch.where((aa > 0).view(-1, 1), _storable(ax / aa).view(-1, 1), fitted.d))
