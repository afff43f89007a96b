"""The rows of kernels.py for the elementwise operations: ours against plain torch operations, all in bfloat16."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from _timing import Row, Work, alternate, duration, timed
from torch import Tensor

from entrenar.ops.cross_entropy.operation import cross_entropy_rows
from entrenar.ops.elementwise.gated_activation import gated_activation
from entrenar.ops.elementwise.rms_norm import rms_norm
from entrenar.ops.elementwise.rotary import rotary

Pair = tuple[Work, Work]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def norm(rows: int, columns: int) -> Pair:
    """As transformers' LlamaRMSNorm has it."""
    x, weight = _random(rows, columns), _random(columns)

    def plain() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()

    return lambda: rms_norm(x, weight, 1e-6), plain


def rotation(batch: int, tokens: int, heads: int, width: int) -> Pair:
    """As transformers' apply_rotary_pos_emb has it."""
    x, cos, sin = _random(batch, tokens, heads, width), _random(1, tokens, width), _random(1, tokens, width)

    def plain() -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(2)

    return lambda: rotary(x, cos, sin), plain


def gated_silu(rows: int, columns: int) -> Pair:
    """Forward and backward."""
    gate, up = _random(rows, columns).requires_grad_(), _random(rows, columns).requires_grad_()
    grad = _random(rows, columns)
    ours = lambda: torch.autograd.grad(gated_activation(gate, up, "silu"), (gate, up), grad)  # noqa: E731
    return ours, lambda: torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)


def cross_entropy(rows: int, vocabulary: int) -> Pair:
    """Losses and gradient; ours writes over its logits, so that each call reads what the last one left."""
    logits, labels = _random(rows, vocabulary), torch.randint(0, vocabulary, (rows,))
    kept = logits.clone().requires_grad_()
    plain = lambda: torch.autograd.grad(F.cross_entropy(kept, labels, reduction="sum"), kept)  # noqa: E731
    return lambda: cross_entropy_rows(logits, labels), plain


MEASURED: dict[str, tuple[Callable[..., Pair], tuple[int, ...]]] = {
    "rms_norm_bf16": (norm, (1024, 2048)),
    "rotary_bf16": (rotation, (2, 512, 32, 64)),
    "gated_silu_bf16": (gated_silu, (1024, 5632)),
    "cross_entropy_bf16": (cross_entropy, (1024, 49152)),
}
LIMIT = 1.5


def elementwise_rows(rounds: int) -> Iterator[tuple[str, Callable[[str], Row]]]:
    """Metric and how to measure it."""
    for name, (prepare, sizes) in MEASURED.items():

        def measure(metric: str, prepare: Callable[..., Pair] = prepare, sizes: tuple[int, ...] = sizes) -> Row:
            ours, plain = prepare(*sizes)
            times = alternate(ours, timed(plain), rounds)
            return duration(metric, "x".join(map(str, sizes)), times, "torch", LIMIT)

        yield name, measure
