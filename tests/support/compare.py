"""How far a float32 computation that is rounded once may be from the exact result."""

import torch
from torch import Tensor


def spacing(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at the magnitude of exact (float64), denormals included."""
    info = torch.finfo(dtype)
    size = exact.abs().clamp(min=info.smallest_normal, max=info.max)
    return torch.exp2(torch.log2(size).floor()) * info.eps


def assert_rounded_once(found: Tensor, exact: Tensor, slack: float | Tensor, scale: Tensor | None = None) -> None:
    """Found is within half a step of its dtype of exact, and `slack` units of 2⁻²⁴ for the float32 arithmetic before.

    Args:
        exact: float64. scale: what the units are relative to where terms cancel; exact itself if None.
    """
    size = exact.abs() if scale is None else scale
    allowed = spacing(exact, found.dtype) / 2 + slack * (size * 2.0**-24 + 2.0**-149)
    info = torch.finfo(found.dtype)
    wide = found.double()
    near = (wide - exact).abs() <= allowed
    both_overflow = wide.isinf() & (exact.abs() + allowed > info.max) & (wide.sign() == exact.sign())
    good = near | both_overflow | (wide.isnan() & exact.isnan())
    assert found.shape == exact.shape
    assert good.all(), f"{(~good).sum()} of {good.numel()} are off, the first: {wide[~good][0]} not {exact[~good][0]}"
