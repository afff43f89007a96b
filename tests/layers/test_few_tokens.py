"""Layers over few tokens of bfloat16: every way a weight is held, against float64, on every path."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar import native
from entrenar.layers.adapted_linear import AdaptedLinear, adapted_linears
from entrenar.layers.adapted_native import forward_native
from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.gguf.blocks import DEQUANTIZED_TYPES
from entrenar.ops.linear.weight import CodebookWeight, DenseWeight, GGUFWeight, Int8Weight, LinearWeight
from entrenar.ops.scales import nest_scales
from entrenar.ops.symmetric.dequantize import dequantize_int8
from tests.support.guards import assert_guard, guarded
from tests.support.products import packed_weight

CODEBOOK = torch.linspace(-1, 1, 16) ** 3
BLOCKED = sorted(DEQUANTIZED_TYPES)
Held = tuple[LinearWeight, Tensor]  # and the matrix it stands for, float32
Make = Callable[[int, int, int, bool], Held]  # rows, columns, block size, whether scales are nested

pytestmark = pytest.mark.skipif(len(native.supported_paths()) == 1, reason="needs the native library")


def four_bits(rows: int, columns: int, block_size: int, nested: bool) -> Held:
    packed = torch.randint(0, 256, (-(-rows * columns // 2),), dtype=torch.uint8)
    scales = torch.rand(-(-rows * columns // block_size)) * 0.3
    held = nest_scales(scales) if nested else [scales]
    matrix = dequantize_codebook(packed, held, CODEBOOK, block_size, rows * columns, torch.float32)
    return CodebookWeight(packed, held, CODEBOOK, block_size, (rows, columns)), matrix.view(rows, columns)


def eight_bits(rows: int, columns: int, block_size: int, nested: bool) -> Held:
    codes = torch.randint(0, 256, (rows * columns,), dtype=torch.uint8)
    scales = torch.rand(-(-rows * columns // block_size)) * 0.01
    held = nest_scales(scales) if nested else [scales]
    matrix = dequantize_int8(codes, held, block_size, torch.float32)
    return Int8Weight(codes, held, block_size, (rows, columns)), matrix.view(rows, columns)


def check(x: Tensor, weights: list[Held], rank: int, bias: bool) -> None:
    """A group of layers over x, against float64 to the roundings of bfloat16."""
    members, expected, sizes = [], [], []
    for weight, matrix in weights:
        a, b = torch.randn(rank, x.shape[1]), torch.randn(len(matrix), rank)
        added = torch.randn(len(matrix)).bfloat16() if bias else None
        members.append(AdaptedLinear(weight, added, *((a, b) if rank else (None, None)), 0.5))
        wide, plain = x.double(), torch.zeros(len(matrix)) if added is None else added
        expected.append(wide @ matrix.double().t() + plain + 0.5 * (wide @ a.double().t()) @ b.double().t())
        low_rank = 0.5 * (wide.abs() @ a.double().abs().t()) @ b.double().abs().t()
        # Roundings of 2^-8: of the weight and of the result; of A, x·Aᵀ, B and the result.
        sizes.append(2.1 * (wide.abs() @ matrix.double().abs().t() + plain.abs()) + 4.1 * low_rank)
    with torch.no_grad():
        found = adapted_linears(x, members)
    for one, value, size in zip(found, expected, sizes, strict=True):
        assert ((one.double() - value).abs() <= 2.0**-8 * size + 1e-30).all()


@settings(max_examples=60, deadline=None)
@given(
    make=st.sampled_from([four_bits, eight_bits]), tokens=st.integers(0, 5), rows=st.integers(1, 70),
    columns=st.integers(1, 90), block=st.sampled_from([16, 32, 64, 128, 512]), whole=st.booleans(),
    nested=st.booleans(), rank=st.integers(0, 20), bias=st.booleans(),
)  # fmt: skip
def test_any_shape(
    kernel_path: str, make: Make, tokens: int, rows: int, columns: int, block: int, whole: bool, nested: bool,
    rank: int, bias: bool,
) -> None:  # fmt: skip
    """Rows that are whole blocks, and a last chunk of any length among them, stay packed; others are decoded."""
    columns = columns * 16 // min(block, 128) * block + block if whole else columns
    check(torch.randn(tokens, columns).bfloat16(), [make(rows, columns, block, nested)], rank, bias)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("type", BLOCKED)
def test_every_type_of_blocks(kernel_path: str, type: str, tokens: int) -> None:
    packed, matrix = packed_weight(type, 21, 3)
    check(torch.randn(tokens, matrix.shape[1]).bfloat16(), [(GGUFWeight(packed, type), matrix)], 4, True)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_a_group_of_every_kind(kernel_path: str, tokens: int) -> None:
    columns = 2048 + 192  # more than a tile of decoded columns
    matrix = torch.randn(33, columns)
    blocks, values = packed_weight("q8_0", 18, columns // 32)
    weights = [
        (DenseWeight(matrix.bfloat16()), matrix.bfloat16().float()), (DenseWeight(matrix), matrix),
        (DenseWeight(matrix.half()), matrix.half().float()), four_bits(40, columns, 64, True),
        eight_bits(7, columns, 64, False), (GGUFWeight(blocks, "q8_0"), values),
    ]  # fmt: skip
    check(torch.randn(tokens, columns).bfloat16(), weights, 16, False)


def test_more_blocks_in_a_row_than_scales_are_decoded_at_once(kernel_path: str) -> None:
    x = torch.randn(2, 9 * 1024).bfloat16()
    check(x, [four_bits(3, 9 * 1024, 16, False), eight_bits(3, 9 * 1024, 16, True)], 0, False)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(kernel_path: str, threads: int) -> None:
    x, member = torch.randn(3, 192).bfloat16(), AdaptedLinear(four_bits(70, 192, 64, False)[0])
    before = torch.get_num_threads()
    expected = forward_native(x, [member])[0]
    try:
        torch.set_num_threads(threads)
        assert torch.equal(forward_native(x, [member])[0], expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_token_does_not_reach_another(kernel_path: str, value: float) -> None:
    x = torch.randn(2, 192).bfloat16()
    x[0, 100] = value
    for weight, matrix in (four_bits(20, 192, 64, False), eight_bits(20, 192, 64, False), packed(20)):
        (found,) = forward_native(x, [AdaptedLinear(weight)])
        assert not found[0][matrix[:, 100] != 0].isfinite().any()
        assert found[1].isfinite().all()


def packed(rows: int) -> Held:
    blocks, matrix = packed_weight("q4_1", rows, 6)
    return GGUFWeight(blocks, "q4_1"), matrix


def test_nothing_is_written_behind_the_result(kernel_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y, raw = guarded(3 * 19, torch.bfloat16)
    x, member = torch.randn(3, 192).bfloat16(), AdaptedLinear(four_bits(19, 192, 64, False)[0])
    monkeypatch.setattr(Tensor, "new_empty", lambda *_: y.view(3, 19))
    forward_native(x, [member])
    monkeypatch.undo()
    assert_guard(raw)
    assert torch.equal(y.view(3, 19), forward_native(x, [member])[0])
