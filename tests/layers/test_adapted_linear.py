"""Adapted linear layers as one function: against the plain modules, numeric gradients, and float64 in bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.layers.adapted_linear import AdaptedLinear, adapted_linears
from entrenar.ops.linear.weight import CodebookWeight, DenseWeight, Int8Weight, LinearWeight

CODEBOOK = torch.linspace(-1, 1, 16)


def weight(kind: str, rows: int, columns: int) -> LinearWeight:
    matrix = torch.randn(rows, columns)
    if kind == "dense":
        return DenseWeight(matrix)
    scales = [torch.rand(-(-rows * columns // 64)) * 0.3]
    if kind == "int8":
        codes = torch.randint(0, 256, (rows * columns,), dtype=torch.uint8)
        return Int8Weight(codes, [scales[0] / 127], 64, (rows, columns))
    packed = torch.randint(0, 256, (-(-rows * columns // 2),), dtype=torch.uint8)
    return CodebookWeight(packed, scales, CODEBOOK, 64, (rows, columns))


def member(
    kind: str, rows: int, columns: int, rank: int, bias: bool = True, dtype: torch.dtype = torch.float32
) -> AdaptedLinear:
    """A layer with random factors, or without any for rank 0."""

    def trained(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    factors = (trained(rank, columns), trained(rows, rank)) if rank else (None, None)
    return AdaptedLinear(weight(kind, rows, columns), trained(rows) if bias else None, *factors, scale=0.5)


def trained_tensors(members: list[AdaptedLinear]) -> list[Tensor]:
    return [tensor for one in members for tensor in (one.bias, one.a, one.b) if tensor is not None]


def exactly(
    x: Tensor, members: list[AdaptedLinear], grads: list[Tensor], magnitudes: bool = False
) -> tuple[Tensor, ...]:
    """Outputs and gradients out of float64 matrices; or how large their terms are, with every number made positive."""
    prepare = torch.abs if magnitudes else torch.clone
    wide = prepare(x.detach().double()).requires_grad_()
    leaves, outputs = [wide], []
    for one in members:
        dense = one.weight.product(torch.eye(one.weight.shape[1], dtype=x.dtype)).t()
        y = wide @ prepare(dense.double()).t()
        bias, a, b = (
            None if tensor is None else prepare(tensor.detach().double()).requires_grad_()
            for tensor in (one.bias, one.a, one.b)
        )
        leaves += [tensor for tensor in (bias, a, b) if tensor is not None]
        y = y if bias is None else y + bias
        outputs.append(y if a is None or b is None else y + one.scale * (wide @ a.t()) @ b.t())
    return *outputs, *torch.autograd.grad(outputs, leaves, [prepare(grad.double()) for grad in grads])


GROUPS = [
    [("codebook", 7, 3, True)],
    [("dense", 5, 0, False)],
    [("codebook", 7, 2, False), ("codebook", 4, 1, True), ("dense", 6, 3, True)],
    [("int8", 3, 0, True), ("codebook", 8, 4, False)],
]


@pytest.mark.parametrize("layout", GROUPS)
def test_gradients_are_the_numeric_ones(layout: list[tuple[str, int, int, bool]]) -> None:
    members = [member(kind, rows, 9, rank, bias, torch.float64) for kind, rows, rank, bias in layout]
    x = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    tensors = trained_tensors(members)
    assert torch.autograd.gradcheck(lambda x, *_: adapted_linears(x, members), (x, *tensors))


@pytest.mark.parametrize("layout", GROUPS)
def test_it_is_the_plain_modules_with_their_gradients(
    kernel_path: str, layout: list[tuple[str, int, int, bool]]
) -> None:
    members = [member(kind, rows * 8, 70, rank, bias) for kind, rows, rank, bias in layout]
    tensors = trained_tensors(members)
    x = torch.randn(5, 8, 70, requires_grad=True)
    outputs = adapted_linears(x, members)
    grads = [torch.randn_like(y) for y in outputs]
    found = torch.autograd.grad(outputs, (x, *tensors), grads)
    for one, other in zip((*outputs, *found), exactly(x, members, grads), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 80),
    columns=st.integers(1, 200),
    layout=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 40)), min_size=1, max_size=3),
)
def test_bfloat16_is_float64_to_its_rounding(
    kernel_path: str, tokens: int, columns: int, layout: list[tuple[int, int]]
) -> None:
    members = [member("codebook", rows, columns, rank, bias=rank % 2 == 0) for rows, rank in layout]
    tensors = trained_tensors(members)
    x = torch.randn(tokens, columns).bfloat16().requires_grad_()
    outputs = adapted_linears(x, members)
    grads = [torch.randn_like(y) for y in outputs]
    found = torch.autograd.grad(outputs, (x, *tensors), grads)
    expected, sizes = exactly(x, members, grads), exactly(x, members, grads, magnitudes=True)
    for one, other, size in zip((*outputs, *found), expected, sizes, strict=True):
        # Roundings of 2^-8 each: of weight and factors, of u and v, of the result.
        assert ((one.double() - other).abs() <= 4 * 2.0**-8 * size + 1e-6).all()


def test_an_output_that_is_not_used_adds_nothing(kernel_path: str) -> None:
    members = [member("codebook", 16, 64, 4), member("codebook", 24, 64, 4)]
    x = torch.randn(20, 64, dtype=torch.bfloat16, requires_grad=True)
    used, _ = adapted_linears(x, members)
    grads = torch.autograd.grad(used, (x, *trained_tensors(members)), torch.ones_like(used), allow_unused=True)
    assert [grad is None for grad in grads] == [False, False, False, False, True, True, True]
    (alone,) = adapted_linears(x, members[:1])
    expected = torch.autograd.grad(alone, x, torch.ones_like(alone))
    assert torch.equal(grads[0], expected[0])


def test_what_is_kept_is_x_and_the_factors_and_without_factors_nothing() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(20, 64, requires_grad=True)
    members = [member("codebook", 16, 64, 4), member("codebook", 24, 64, 4)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted_linears(x, members)
        factors = [tensor for one in members for tensor in (one.a, one.b) if tensor is not None]
        assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (x, *factors)}
        kept.clear()
        adapted_linears(x, [member("codebook", 16, 64, 0)])
        assert kept == []


def test_a_factor_changed_before_the_backward_is_an_error() -> None:
    one = member("codebook", 16, 64, 4)
    (y,) = adapted_linears(torch.randn(20, 64), [one])
    assert one.a is not None
    with torch.no_grad():
        one.a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_passes_through_without_a_break(dtype: torch.dtype) -> None:
    members = [member("codebook", 16, 64, 4), member("dense", 24, 64, 0)]

    def layers(x: Tensor) -> Tensor:
        first, second = adapted_linears(x * 2, members)
        return first.sum() + second.relu().sum()

    x = torch.randn(20, 64, dtype=dtype, requires_grad=True)
    expected = torch.autograd.grad(layers(x), x)[0]
    found = torch.autograd.grad(torch.compile(layers, fullgraph=True, backend="aot_eager")(x), x)[0]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0.3)


@pytest.mark.parametrize("layout", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 9])
def test_without_gradients_the_same_outputs(
    layout: list[tuple[str, int, int, bool]], dtype: torch.dtype, tokens: int
) -> None:
    members = [member(kind, rows * 8, 70, rank, bias) for kind, rows, rank, bias in layout]
    x = torch.randn(tokens, 2, 70).to(dtype)
    expected = adapted_linears(x.requires_grad_(), members)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = adapted_linears(x, members)
        assert not any(y.requires_grad for y in found)
        assert all(torch.equal(one, other.detach()) for one, other in zip(found, expected, strict=True))
