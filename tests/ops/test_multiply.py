"""Sums of products with weights decoded on the way: against float64, on every path that multiplies bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.ops.codebook.dequantize import dequantize_codebook
from entrenar.ops.gguf.blocks import dequantize_gguf, quantize_gguf
from entrenar.ops.linear.multiply import Term, WeightView, codebook_weight, dense_weight, gguf_weight, multiply
from tests.support.guards import assert_guard, guarded
from tests.support.products import assert_close, exact

CODEBOOK = torch.linspace(-1, 1, 16)
pytestmark = pytest.mark.usefixtures("native_path")


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def four_bit(rows: int, columns: int) -> tuple[WeightView, Tensor]:
    """A weight in 4 bits, and what it decodes to."""
    count = rows * columns
    packed = torch.randint(0, 256, (-(-count // 2),), dtype=torch.uint8)
    scales = [torch.rand(-(-count // 64)) * 0.1]
    dense = dequantize_codebook(packed, scales, CODEBOOK, 64, count, torch.bfloat16).view(rows, columns)
    return codebook_weight(packed, scales, CODEBOOK, 64, (rows, columns)), dense


sizes = st.integers(1, 140)


@settings(max_examples=60, deadline=None)
@given(rows=sizes, columns=sizes, inner=sizes, transposed=st.booleans(), dense=st.booleans())
def test_one_product_of_any_shape(rows: int, columns: int, inner: int, transposed: bool, dense: bool) -> None:
    shape = (columns, inner) if transposed else (inner, columns)
    matrix = random(*shape)
    weight, matrix = (dense_weight(matrix), matrix) if dense else four_bit(*shape)
    a = random(rows, inner)
    found = multiply([Term(a, weight, transposed)], torch.empty(rows, columns))
    assert_close(found, *exact([(a, matrix.t() if transposed else matrix)]))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(33, 100, 6001), (2050, 40, 64), (5, 3000, 2304), (70, 64, 9000)]
)
def test_a_sum_that_takes_several_panels_passes_and_chunks(
    rows: int, columns: int, inner: int, out_dtype: torch.dtype
) -> None:
    weight, matrix = four_bit(columns, inner)
    a, u, b, bias = random(rows, inner), random(rows, 16), torch.randn(columns, 16), random(columns)
    terms = [Term(a, weight, True), Term(u, dense_weight(b, scale=0.5), True)]
    found = multiply(terms, torch.empty(rows, columns, dtype=out_dtype), alpha=2.0, bias=bias)
    value, size = exact([(a, matrix.t()), (u, (b * 0.5).bfloat16().t())])
    assert_close(found, 2 * value + bias.double(), 2 * size + bias.double().abs())


@pytest.mark.parametrize("transposed", [False, True])
def test_results_are_rounded_to_the_nearest_even_and_nan_stays_nan(transposed: bool) -> None:
    largest, inf = torch.finfo(torch.bfloat16).max, torch.inf
    pairs = [(1, 2**-8), (1, 3 * 2**-8), (-1, -(2**-8)), (1, 2**-8 + 2**-15), (3, -3)]
    pairs += [(largest, largest), (largest, 2.0**119), (inf, -inf), (inf, 1), (torch.nan, 1)]
    b = torch.tensor(pairs).t().repeat(1, 5)[:, :49]  # whole vectors and a rest
    expected = b.sum(0).bfloat16().expand(3, -1)
    for matrix in (b.bfloat16(), b.sum(0, keepdim=True)):  # rounded as a result, and where float32 is decoded
        a, weight = (
            torch.ones(3, len(matrix)).bfloat16(),
            dense_weight((matrix.t() if transposed else matrix).contiguous()),
        )
        found = multiply([Term(a, weight, transposed)], torch.empty(3, 49, dtype=torch.bfloat16))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_written_around_the_result(dtype: torch.dtype) -> None:
    for columns in (1, 45, 64):
        weight, _ = four_bit(columns, 70)
        out, raw = guarded(7 * columns, dtype)
        multiply([Term(random(7, 70), weight, True)], out.view(7, columns), bias=random(columns))
        assert_guard(raw)


def test_rows_apart_and_a_weight_smaller_than_asked_for() -> None:
    wide, b = random(50, 100), torch.randn(20, 16)
    a = wide[:, 10:42]  # 32 columns of which the weight has 16
    found = multiply([Term(a, dense_weight(b), True)], torch.empty(50, 32))
    expected = exact([(a[:, :16], b.bfloat16().t())])
    assert_close(found[:, :20], *expected)
    assert (found[:, 20:] == 0).all()


def test_any_number_of_threads_gives_the_same_bytes() -> None:
    weight, _ = four_bit(600, 700)
    a = random(300, 700)
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(multiply([Term(a, weight, True)], torch.empty(300, 600)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_torchs_own_tiles_survive_ours() -> None:
    weight, _ = four_bit(64, 64)
    a, b = random(64, 64), random(64, 64)
    expected = a @ b
    for rows in (5, 20, 64):
        multiply([Term(a[:rows], weight, True)], torch.empty(rows, 64))
        assert torch.equal(a @ b, expected)


def test_empty_sides() -> None:
    weight, _ = four_bit(4, 8)
    assert multiply([Term(random(0, 8), weight, True)], torch.empty(0, 4)).shape == (0, 4)
    assert (multiply([Term(random(3, 0), dense_weight(random(0, 4)), False)], torch.ones(3, 4)) == 0).all()


def test_a_buffer_too_small_for_its_sizes_is_an_error() -> None:
    weight, _ = four_bit(4, 8)
    short = codebook_weight(torch.zeros(15, dtype=torch.uint8), [torch.zeros(1)], CODEBOOK, 64, (4, 8))
    a = random(3, 8)
    for terms, bias in (([Term(a, short, True)], None), ([Term(a, weight, True)], random(3))):
        with pytest.raises(InputError, match="too small"):
            multiply(terms, torch.empty(3, 4), bias=bias)


@pytest.mark.parametrize("type", ["q4_0", "q5_1", "q8_0", "q4_k", "q6_k"])
@pytest.mark.parametrize("transposed", [True, False])
def test_blocks_of_a_gguf_are_decoded_inside_the_product(type: str, transposed: bool) -> None:
    rows, columns = 70, 768
    packed = quantize_gguf(torch.randn(rows, columns), type)
    dense = dequantize_gguf(packed, type, columns, torch.bfloat16)
    a = random(9, columns if transposed else rows)
    b = dense.t() if transposed else dense
    found = multiply([Term(a, gguf_weight(packed, type, (rows, columns)), transposed)], torch.empty(9, b.shape[1]))
    assert_close(found, *exact([(a, b)]))


def test_blocks_that_are_too_few_or_unknown_are_refused() -> None:
    packed, a = quantize_gguf(torch.randn(4, 256), "q4_k"), random(2, 256)
    for weight in (gguf_weight(packed, "q4_k", (5, 256)), gguf_weight(packed, "f64", (4, 256))):
        with pytest.raises(InputError):
            multiply([Term(a, weight, transposed=True)], torch.empty(2, weight.view.rows))
