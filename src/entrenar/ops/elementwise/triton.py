"""Norms, gated activations and rotations on a GPU: each what its reference does in some ten launches, as one.

Formulas and arguments are those of the reference beside which each kernel is registered (ops/elementwise/rms_norm.py,
ops/elementwise/gated_activation.py, ops/elementwise/rotary.py); computed in float32, rounded once.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from entrenar.ops.blocks import block_count
from entrenar.ops.gpu_kernels import where_it_is

_ELEMENTS = 1024  # for one program
_ROTATED_ELEMENTS = 2048


@triton.jit
def _rms_norm_kernel(
    x, weight, out, rows, features, eps, offset,  # noqa: ANN001 - Triton reads annotations, and knows its own alone
    height: tl.constexpr, width: tl.constexpr,
) -> None:  # fmt: skip
    row, column = tl.program_id(0) * height + tl.arange(0, height), tl.arange(0, width)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    place = row.to(tl.int64)[:, None] * features + column[None, :]
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < features, other=0.0).to(tl.float32) + offset
    r = 1 / tl.sqrt(tl.sum(wide * wide, axis=1) / features + eps)
    tl.store(out + place, (wide * r[:, None] * factor[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    grad, x, weight, residual, out, rows, features, eps, offset,  # noqa: ANN001
    adds: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
) -> None:  # fmt: skip
    row, column = tl.program_id(0) * height + tl.arange(0, height), tl.arange(0, width)
    inside = (row < rows)[:, None] & (column < features)[None, :]
    place = row.to(tl.int64)[:, None] * features + column[None, :]
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < features, other=0.0).to(tl.float32) + offset
    h = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    r = 1 / tl.sqrt(tl.sum(wide * wide, axis=1) / features + eps)
    mean = tl.sum(h * wide, axis=1) / features
    dx = r[:, None] * h - wide * (r * r * r * mean)[:, None]
    if adds:
        dx += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, dx.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """X (..., D) → (..., D)."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        grid, shape = _rows(x)
        _launch(_rms_norm_kernel, grid, x, weight.contiguous(), out, *_sizes(x), eps, offset, **shape)
    return out


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None
) -> Tensor:
    """grad, x and residual (..., D) → dx (..., D), the residual added."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        added = x if residual is None else residual.contiguous()
        grid, shape = _rows(x)
        _launch(
            _rms_norm_backward_kernel, grid, grad.contiguous(), x, weight.contiguous(), added, out,
            *_sizes(x), eps, offset, adds=residual is not None, **shape,
        )  # fmt: skip
    return out


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _rows(x: Tensor) -> tuple[int, dict[str, int]]:
    """How many programs, and the shape of each: whole rows, several where they are short."""
    width = _power_of_two(x.shape[-1])
    height = max(_ELEMENTS // width, 1)
    warps = 4 if width <= 2048 else 8 if width <= 8192 else 16
    return block_count(_sizes(x)[0], height), {"height": height, "width": width, "num_warps": warps}


@triton.jit
def _factor_and_slope(x, tanh: tl.constexpr):  # noqa: ANN001, ANN202
    """As in ops/elementwise/gated_activation.py."""
    if tanh:
        near = tl.minimum(tl.maximum(x, -20.0), 20.0)
        twice_u = near * (1.5957691216057308 * (1 + 0.044715 * (near * near)))
        steepness = 1.5957691216057308 * (1 + 3 * 0.044715 * (near * near))
        factor = tl.sigmoid(twice_u)
        slope = factor + near * steepness * tl.sigmoid(-twice_u) * factor
    else:
        factor = tl.sigmoid(x)
        slope = factor + x * tl.sigmoid(-x) * factor
    return factor, slope


@triton.jit
def _gated_kernel(gate, up, out, count, tanh: tl.constexpr, size: tl.constexpr) -> None:  # noqa: ANN001
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    factor, _ = _factor_and_slope(x, tanh)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(out + place, (x * factor * other).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward_kernel(
    grad, gate, up, dgate, dup, count, tanh: tl.constexpr, size: tl.constexpr,  # noqa: ANN001
) -> None:  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    factor, slope = _factor_and_slope(x, tanh)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(dgate + place, (upstream * other * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + place, (upstream * (x * factor)).to(dup.dtype.element_ty), mask=inside)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """silu and gelu_tanh."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _flat(_gated_kernel, kind, gate.contiguous(), up.contiguous(), out)
    return out


def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dgate, dup = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    _flat(_gated_backward_kernel, kind, grad.contiguous(), gate.contiguous(), up.contiguous(), dgate, dup)
    return dgate, dup


def _flat(kernel: Any, kind: str, *tensors: Tensor) -> None:
    count = tensors[0].numel()
    if count:
        grid = block_count(count, _ELEMENTS)
        _launch(kernel, grid, *tensors, count, tanh=kind == "gelu_tanh", size=_ELEMENTS)


@triton.jit
def _rotary_kernel(
    x, cos, sin, out, tokens, heads, width, rotated, x_batch, x_token, x_head, angles_batch,  # noqa: ANN001
    transpose: tl.constexpr, many: tl.constexpr, half: tl.constexpr, rest: tl.constexpr,
) -> None:  # fmt: skip
    row, batch, token = tl.program_id(0), tl.program_id(0) // tokens, tl.program_id(0) % tokens
    head = tl.program_id(1) * many + tl.arange(0, many)
    column, halved = tl.arange(0, half), rotated // 2
    turning = column < halved
    inside = (head < heads)[:, None] & turning[None, :]
    angle = batch.to(tl.int64) * angles_batch + token.to(tl.int64) * rotated + column
    c1 = tl.load(cos + angle, mask=turning, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + angle + halved, mask=turning, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + angle, mask=turning, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + angle + halved, mask=turning, other=0.0).to(tl.float32)[None, :]
    start = batch.to(tl.int64) * x_batch + token.to(tl.int64) * x_token
    read = x + start + head.to(tl.int64)[:, None] * x_head
    write = out + (row.to(tl.int64) * heads + head)[:, None] * width
    x1 = tl.load(read + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(read + column[None, :] + halved, mask=inside, other=0.0).to(tl.float32)
    if transpose:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    tl.store(write + column[None, :], y1.to(out.dtype.element_ty), mask=inside)
    tl.store(write + column[None, :] + halved, y2.to(out.dtype.element_ty), mask=inside)
    if rest:
        left = rotated + tl.arange(0, rest)
        copied = (head < heads)[:, None] & (left < width)[None, :]
        tl.store(write + left[None, :], tl.load(read + left[None, :], mask=copied, other=0.0), mask=copied)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> Tensor:
    """X (B, T, H, D), cos and sin (B or 1, T, R) → (B, T, H, D)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    batches, tokens, heads, width = x.shape
    rotated, wide = cos.shape[-1], _power_of_two(max(x.shape[-1], 2))
    if x.numel():
        many = min(max(_ROTATED_ELEMENTS // wide, 1), _power_of_two(heads))
        _launch(
            _rotary_kernel, (batches * tokens, block_count(heads, many)), x, cos.contiguous(), sin.contiguous(), out,
            tokens, heads, width, rotated, *x.stride()[:3], 0 if len(cos) == 1 else tokens * rotated,
            transpose=transpose, many=many, half=_power_of_two(max(rotated // 2, 1)),
            rest=_power_of_two(width - rotated) if width > rotated else 0,
        )  # fmt: skip
    return out


def _power_of_two(count: int) -> int:
    """The smallest that is not below count > 0: Triton's ranges have such lengths."""
    return 1 << (count - 1).bit_length()


def _launch(kernel: Any, grid: int | tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
    """Every product is rounded for itself, as the references' are: no fused multiply-adds."""
    with where_it_is(x):
        kernel[grid if isinstance(grid, tuple) else (grid,)](x, *args, **options, enable_fp_fusion=False)
