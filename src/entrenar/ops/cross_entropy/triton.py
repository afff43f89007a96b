"""Cross-entropy of rows of logits on a GPU: one program a row, which is read twice and written once."""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from entrenar.ops.gpu_kernels import where_it_is

_ELEMENTS = 4096  # of a row, at a time
_LOWEST = tl.constexpr(-3.0e38)  # finite: a difference of two of them is no NaN


@triton.jit
def _tanh(x):  # noqa: ANN001, ANN202 - Triton reads annotations, and knows its own alone
    """A series where the quotient would cancel."""
    square = x * x
    series = x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835)))))
    small = tl.exp(-2 * tl.abs(x))
    quotient = (1 - small) / (1 + small)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _capped(z, softcap, caps: tl.constexpr):  # noqa: ANN001, ANN202
    if caps:
        z = _tanh(z / softcap) * softcap
    return z


@triton.jit
def _kernel(
    logits, labels, losses, softcap,  # noqa: ANN001
    vocabulary: tl.constexpr, caps: tl.constexpr, gradient: tl.constexpr, size: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, line = tl.load(labels + row), logits + row * vocabulary
    known = (label >= 0) & (label < vocabulary)
    wanted = _capped(tl.load(line + label, mask=known, other=0.0).to(tl.float32), softcap, caps)
    most, total = tl.full([size], _LOWEST, tl.float32), tl.zeros([size], tl.float32)
    for start in range(0, vocabulary, size):
        column = start + tl.arange(0, size)
        inside = column < vocabulary
        z = _capped(tl.load(line + column, mask=inside, other=0.0).to(tl.float32), softcap, caps)
        larger = tl.maximum(most, tl.where(inside, z, _LOWEST))
        total = total * tl.exp(most - larger) + tl.where(inside, tl.exp(z - larger), 0.0)
        most = larger
    top = tl.max(most, axis=0)
    logarithm = top + tl.log(tl.sum(total * tl.exp(most - top), axis=0))
    tl.store(losses + row, tl.where(known, logarithm - wanted, float("nan")))
    if gradient:
        for start in range(0, vocabulary, size):
            column = start + tl.arange(0, size)
            inside = column < vocabulary
            z = _capped(tl.load(line + column, mask=inside, other=0.0).to(tl.float32), softcap, caps)
            slope = tl.exp(z - logarithm) - tl.where(column == label, 1.0, 0.0)
            if caps:
                slope *= 1 - (z / softcap) * (z / softcap)
            tl.store(line + column, slope.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, labels: Tensor, softcap: float, *, gradient: bool) -> Tensor:
    """Logits (N, V), contiguous, overwritten by the gradient if that is asked for; labels (N,) → losses (N,) float32.

    A label outside the vocabulary makes its row's loss NaN: to look at labels before, the host would have to wait for
    the GPU.
    """
    losses = torch.empty_like(labels, dtype=torch.float32, memory_format=torch.contiguous_format)
    kernel: Any = _kernel
    if logits.numel():
        with where_it_is(logits):
            kernel[(len(logits),)](
                logits, labels.contiguous(), losses, softcap,
                vocabulary=logits.shape[1], caps=softcap > 0, gradient=gradient, size=_ELEMENTS, num_warps=8,
            )  # fmt: skip
    return losses
