"""Cross-entropy of rows of logits, with the gradient written over the logits.

loss = log Σⱼ e^zⱼ − z_label with z = logits, or z = softcap · tanh(logits / softcap) (Gemma 2, section 2); the gradient
of the sum of the losses is (softmax(z) − one-hot) · dz/dlogits. No autograd of its own: the logits are gone afterwards;
a caller's autograd.Function keeps the gradient instead of them. Letters: N rows, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.elementwise.precision import widen
from entrenar.ops.gpu_kernels import GpuKernel, numbers
from entrenar.ops.registration import call, define

_kernel = native.Function("cross_entropy")


def cross_entropy_rows(logits: Tensor, labels: Tensor, softcap: float = 0.0) -> Tensor:
    """Losses of the rows; the logits are overwritten by the gradient of the losses' sum, rounded to their dtype.

    Args:
        logits: (N, V) float, before the softcap. labels: (N,) int64 in [0, V). softcap: 0 for none.
    Returns:
        (N,) float32 (float64 for float64 logits), in nats; NaN for a row with a NaN.

    Raises:
        InputError: a label outside [0, V), or shapes, dtypes or a softcap that do not fit. On a GPU a label outside
            makes its row's loss NaN instead: to look at labels there, the host would have to wait.
    """
    return torch.ops.entrenar.cross_entropy_rows(logits, labels, softcap)


def cross_entropy_losses(logits: Tensor, labels: Tensor, softcap: float = 0.0) -> Tensor:
    """`cross_entropy_rows` without a gradient: the logits stay as they are."""
    return call("cross_entropy_losses", logits, labels, softcap)


def _check(logits: Tensor, labels: Tensor, softcap: float) -> None:
    _check_forms(logits, labels, softcap)
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        row = int(outside.nonzero()[0])
        raise InputError(
            f"label {int(labels[row])} of row {row} is outside the vocabulary: allowed are 0 to {logits.shape[1] - 1}; "
            "leave out the rows that have no target"
        )


def _check_forms(logits: Tensor, labels: Tensor, softcap: float) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"cross-entropy got logits {list(logits.shape)} and labels {list(labels.shape)} {labels.dtype}: "
            "give logits (N, V) and labels (N,) int64"
        )
    if not 0 <= softcap < math.inf:
        raise InputError(f"the softcap is {softcap}: give a positive number, or 0 for none")


def _capped(logits: Tensor, softcap: float) -> Tensor:
    (wide,) = widen(logits)
    return torch.tanh(wide / softcap) * softcap if softcap else wide


def _losses_reference(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    _check(logits, labels, softcap)
    return torch.nn.functional.cross_entropy(_capped(logits, softcap), labels, reduction="none")


def _rows_reference(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    losses = _losses_reference(logits, labels, softcap)
    z = _capped(logits, softcap)
    gradient = torch.softmax(z, dim=1)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    logits.copy_(gradient * (1 - (z / softcap).square()) if softcap else gradient)
    return losses


def _rows_native(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    dense = logits.contiguous()
    losses = _call(dense, labels, softcap, gradient=True)
    if dense is not logits:
        logits.copy_(dense)
    return losses


def _losses_native(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    return _call(logits.contiguous(), labels, softcap, gradient=False)


def _rows_gpu(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    return _on_gpu(logits, labels, softcap, gradient=True)


def _losses_gpu(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:
    return _on_gpu(logits, labels, softcap, gradient=False)


def _on_gpu(logits: Tensor, labels: Tensor, softcap: float, gradient: bool) -> Tensor:
    from entrenar.ops.cross_entropy.triton import cross_entropy

    _check_forms(logits, labels, softcap)
    dense = logits.contiguous()
    losses = cross_entropy(dense, labels, softcap, gradient=gradient)
    if gradient and dense is not logits:
        logits.copy_(dense)
    return losses


def _samples(device: torch.device) -> list[tuple[Any, ...]]:
    labels = torch.tensor([0, 20, 49], device=device)
    return [(numbers(device, 3, 50), labels, softcap) for softcap in (0.0, 2.0)]


def _call(logits: Tensor, labels: Tensor, softcap: float, gradient: bool) -> Tensor:
    _check(logits, labels, softcap)
    losses = _fake(logits, labels, softcap)
    dtype = native.DTYPES[logits.dtype]
    _kernel(logits, labels.contiguous(), losses, *logits.shape, softcap, int(gradient), dtype, native.threads())
    return losses


def _fake(logits: Tensor, labels: Tensor, softcap: float) -> Tensor:  # noqa: ARG001 - one signature
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty_like(labels, dtype=dtype, memory_format=torch.contiguous_format)


def _accepts(logits: Tensor, _labels: Tensor, _softcap: float) -> bool:
    return logits.dtype in native.DTYPES


define(
    "cross_entropy_rows(Tensor(a!) logits, Tensor labels, float softcap) -> Tensor",
    reference=_rows_reference,
    native_cpu=_rows_native,
    gpu=GpuKernel(_rows_gpu, _samples),
    fake=_fake,
    accepts=_accepts,
)
define(
    "cross_entropy_losses(Tensor logits, Tensor labels, float softcap) -> Tensor",
    reference=_losses_reference,
    native_cpu=_losses_native,
    gpu=GpuKernel(_losses_gpu, _samples),
    fake=_fake,
    accepts=_accepts,
)
