"""Triton's kernels on the GPU, and the layers that are made of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from entrenar.layers.adapted_native import AdaptedLinear
from entrenar.layers.composed_blocks import after_attention, before_attention
from entrenar.layers.residual_blocks import AttentionBlock, MlpBlock, Norm
from entrenar.ops import gpu_kernels
from entrenar.ops.linear.weight import CodebookWeight
from entrenar.ops.registration import compute
from tests.support.blocks import factors
from tests.support.composed_blocks import HEADS, HIDDEN, WIDTH, attention_block, mlp_block, rotation_of
from tests.support.triton_kernels import (
    Triton,
    test_a_norm_of_what_does_not_lie_together,
    test_cross_entropy,
    test_cross_entropy_of_what_is_no_number,
    test_decoding,
    test_gated_activations,
    test_norms,
    test_rotations,
)

pytestmark = pytest.mark.cuda
__all__ = [
    "test_a_norm_of_what_does_not_lie_together",
    "test_cross_entropy",
    "test_cross_entropy_of_what_is_no_number",
    "test_decoding",
    "test_gated_activations",
    "test_norms",
    "test_rotations",
]
_GPU = torch.device("cuda")


@pytest.fixture
def triton() -> Triton:
    def run(name: str, *args: Any) -> Any:
        found = compute(name, *args)
        assert all(served for key, served in gpu_kernels._tried.items() if key[0] == name)
        return found

    return Triton("cuda", run)


def _moved(thing: Any) -> Any:
    """The same on the GPU."""
    if isinstance(thing, Tensor):
        return thing.detach().to(_GPU).requires_grad_(thing.requires_grad)
    if isinstance(thing, AdaptedLinear):
        weight = thing.weight
        assert isinstance(weight, CodebookWeight)
        parts = weight.packed.to(_GPU), [scale.to(_GPU) for scale in weight.scales], weight.codebook.to(_GPU)
        moved = CodebookWeight(*parts, weight.block_size, weight.shape)
        bias, a, b = (None if tensor is None else _moved(tensor) for tensor in (thing.bias, thing.a, thing.b))
        return AdaptedLinear(moved, bias, a, b, thing.scale)
    if isinstance(thing, Norm):
        return Norm(thing.weight.to(_GPU), thing.eps, thing.offset)
    if isinstance(thing, AttentionBlock | MlpBlock):
        return type(thing)(**{name: _moved(part) for name, part in vars(thing).items() if not name.startswith("_")})
    return thing


def _gradients(
    attention: AttentionBlock, mlp: MlpBlock, tensors: list[Tensor], rotation: Any, attend: Callable[..., Tensor]
) -> list[Tensor]:
    h, grad = tensors
    h = h.clone().requires_grad_()
    same, q, k, v = before_attention(h, attention, rotation)
    out = after_attention(same, attend(q, k, v), attention.output, mlp)
    members = (attention.q, attention.k, attention.v, attention.output, mlp.gate, mlp.up, mlp.down)
    found = torch.autograd.grad(out, [h, *factors(members)], grad)
    return [one.detach().double().cpu() for one in (out, *found)]


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_the_cpus(norms: bool, dtype: torch.dtype) -> None:
    attention, mlp = attention_block((3, 2, 4, 3), norms), mlp_block((4, 4, 3, 0), "silu")
    rotation = rotation_of(8, torch.float32)
    tensors = [torch.randn(2, 5, HIDDEN).to(dtype) for _ in range(2)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * (k + v).repeat(1, 1, HEADS * WIDTH // k.shape[-1])

    here = _gradients(attention, mlp, [one.float() for one in tensors], rotation, attend)
    moved = tuple(angle.to(_GPU) for angle in rotation or ())
    there = _gradients(_moved(attention), _moved(mlp), [one.to(_GPU) for one in tensors], moved, attend)
    for one, other in zip(there, here, strict=True):
        assert (one - other).norm() < (1e-5 if dtype == torch.float32 else 0.03) * other.norm()
