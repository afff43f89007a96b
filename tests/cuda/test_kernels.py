"""Triton's kernels against the references beside them, on the GPU; and the layers that are made of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_composed_blocks import HEADS, HIDDEN, WIDTH, attention_block, mlp_block, rotation_of
from test_residual_blocks import factors
from torch import Tensor

from entrenar.ops import cross_entropy, gated_activation, gpu_kernels, rms_norm, rotary
from entrenar.ops.adapted_native import Member
from entrenar.ops.composed_blocks import after_attention, before_attention
from entrenar.ops.library import compute
from entrenar.ops.linear_weight import CodebookWeight
from entrenar.ops.residual_blocks import AttentionBlock, MlpBlock, Norm

pytestmark = pytest.mark.cuda
_GPU = torch.device("cuda")
_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
_HUGE = 1e4  # activations of real models have outliers of that size


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    made = torch.randn(*shape, generator=generator)
    if made.numel() > 3:
        made.view(-1)[1], made.view(-1)[2] = _HUGE, 0
    return made.to(_GPU, dtype)


def assert_near(found: Any, expected: Any) -> None:
    """A few units in the last place apart, and never by more than that of the result's size."""
    found, expected = ((one,) if isinstance(one, Tensor) else one for one in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.is_contiguous()
        unit = torch.finfo(one.dtype).eps
        wide, exact = one.double(), other.double()
        assert torch.equal(wide.isnan(), exact.isnan())
        size = exact.nan_to_num().abs()
        rows = size.amax(-1, keepdim=True) if size.dim() > 1 else size
        assert ((wide - exact).nan_to_num().abs() <= unit * size + 1e-6 * rows).all()


def _triton(name: str, *args: Any) -> Any:
    assert gpu_kernels.available()
    return compute(name, *args)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2048), (7, 64), (2, 1), (5, 576), (3, 130), (2, 9000), (0, 64)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    x, grad, residual = (_random(*shape, dtype=dtype, seed=seed) for seed in range(3))
    weight = _random(shape[-1], dtype=torch.bfloat16)
    assert_near(_triton("rms_norm", x, weight, 1e-5, offset), rms_norm._reference(x, weight, 1e-5, offset))
    for added in (None, residual):
        arguments = (grad, x, weight, 1e-5, offset, added)
        assert_near(_triton("rms_norm_backward", *arguments), rms_norm._backward_reference(*arguments))
    spread = x.transpose(0, -1)
    if shape[0]:
        other = _random(shape[0], dtype=dtype)
        assert_near(_triton("rms_norm", spread, other, 1e-5, offset), rms_norm._reference(spread, other, 1e-5, offset))


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 2048), (7, 63), (1,), (0, 64)])
@pytest.mark.parametrize("kind", list(gated_activation.KINDS))
def test_gated_activations(dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    gate, up, grad = (_random(*shape, dtype=dtype, seed=seed) for seed in range(3))
    assert_near(_triton("gated_activation", gate, up, kind), gated_activation._reference(gate, up, kind))
    arguments = (grad, gate, up, kind)
    assert_near(_triton("gated_activation_backward", *arguments), gated_activation._backward_reference(*arguments))


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "rotated", "batches"),
    [((2, 3, 4, 64), 64, 1), ((2, 3, 5, 80), 32, 2), ((1, 200, 32, 128), 128, 1), ((2, 2, 2, 6), 6, 2),
     ((2, 2, 9, 64), 48, 2), ((2, 5, 1, 256), 256, 1), ((0, 4, 2, 8), 8, 1), ((2, 3, 4, 8), 0, 1)],
)  # fmt: skip
@pytest.mark.parametrize("transpose", [False, True])
def test_rotations(
    dtype: torch.dtype, shape: tuple[int, int, int, int], rotated: int, batches: int, transpose: bool
) -> None:
    batch, tokens, heads, width = shape
    x = _random(batch, heads, tokens, width, dtype=dtype).transpose(1, 2)
    cos, sin = (_random(batches, tokens, rotated, seed=seed).clamp(-1, 1) for seed in range(2))
    for one in (x, x.contiguous()):
        found = _triton("rotary", one, cos, sin, transpose)
        assert_near(found, rotary._reference(one, cos, sin, transpose))


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 5000), (4, 100), (2, 128257), (0, 10), (1, 1)])
def test_cross_entropy(dtype: torch.dtype, softcap: float, rows: int, vocabulary: int) -> None:
    logits = torch.randn(rows, vocabulary, device=_GPU).mul(4).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), device=_GPU)
    exact = logits.double()
    expected = cross_entropy._rows_reference(exact, labels, softcap)
    kept = logits.clone()
    losses = _triton("cross_entropy_losses", kept, labels, softcap)
    assert torch.equal(kept, logits)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    again = torch.ops.entrenar.cross_entropy_rows(kept, labels, softcap)
    assert torch.equal(again, losses)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(kept.double(), exact, rtol=max(unit, 1e-4), atol=1e-6)


def test_cross_entropy_of_what_is_no_number() -> None:
    logits = torch.randn(4, 100, device=_GPU)
    logits[1, 7] = torch.nan
    logits[2, 7] = -torch.inf
    losses = _triton("cross_entropy_losses", logits, torch.tensor([100, 3, 4, -1], device=_GPU), 0.0)
    assert losses.isnan().tolist() == [True, True, False, True]


def _moved(thing: Any) -> Any:
    """The same on the GPU."""
    if isinstance(thing, Tensor):
        return thing.detach().to(_GPU).requires_grad_(thing.requires_grad)
    if isinstance(thing, Member):
        weight = thing.weight
        assert isinstance(weight, CodebookWeight)
        parts = weight.packed.to(_GPU), [scale.to(_GPU) for scale in weight.scales], weight.codebook.to(_GPU)
        moved = CodebookWeight(*parts, weight.block_size, weight.shape)
        return Member(moved, *(None if t is None else _moved(t) for t in (thing.bias, thing.a, thing.b)), thing.scale)
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
