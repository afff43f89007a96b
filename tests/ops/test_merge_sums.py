"""Sums over models: every path gives the reference's bits; 16-bit results are rounded once."""

import pytest
import torch
from torch import Tensor

from entrenar import native
from entrenar.ops.merge.sums import Vote, add_absolute_sums, add_gram, task_sum, weighted_sum
from tests.support.compare import assert_rounded_once

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COUNTS = [1, 9, 255, 256, 700]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_count = pytest.mark.parametrize("count", COUNTS)
WEIGHTS = [0.3, -0.5, 0.8]
VOTES = [
    Vote(values=WEIGHTS),
    Vote(values=WEIGHTS, votes=WEIGHTS, divisors=[0.3, 0.5, 0.8], scale=0.7),
    Vote(values=WEIGHTS, votes=[1, 1, 1], divisors=[1, 1, 1], zero_is_positive=False),
    Vote(values=WEIGHTS, votes=WEIGHTS),
]


def models(count: int) -> list[Tensor]:
    """Three models, each of another dtype, with equal and zero elements; the base comes first."""
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(count, generator=generator)
    found = [base + 0.1 * torch.randn(count, generator=generator) for _ in DTYPES]
    found[1][::3] = base[::3]
    return [base.bfloat16(), *(x.to(dtype) for x, dtype in zip(found, DTYPES, strict=True))]


def masks(count: int) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    return [None, *(torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8) for _ in range(2))]


@every_dtype
@every_count
@pytest.mark.parametrize("vote", VOTES, ids=range(len(VOTES)))
@pytest.mark.parametrize("has_base", [True, False])
def test_task_sums_have_the_references_bits(
    kernel_path: str, dtype: torch.dtype, count: int, vote: Vote, has_base: bool
) -> None:
    base, *others = models(count)
    found, expected = torch.empty(count, dtype=dtype), torch.empty(count, dtype=dtype)
    task_sum(base if has_base else None, others, masks(count), vote, found)
    with native.using("reference"):
        task_sum(base if has_base else None, others, masks(count), vote, expected)
    assert torch.equal(found, expected)


@every_dtype
@every_count
def test_weighted_sums_are_rounded_once(kernel_path: str, dtype: torch.dtype, count: int) -> None:
    _, *others = models(count)
    out = torch.empty(count, dtype=dtype)
    weighted_sum(others, WEIGHTS, out)
    terms = torch.stack([weight * x.double() for weight, x in zip(WEIGHTS, others, strict=True)])
    assert_rounded_once(out, terms.sum(0), slack=8, scale=terms.abs().sum(0))


def test_a_nan_is_never_hidden(kernel_path: str) -> None:
    out = torch.empty(2)
    task_sum(
        torch.zeros(2), [torch.tensor([torch.nan, 1])], [torch.zeros(2, dtype=torch.uint8)], Vote(values=[1.0]), out
    )
    assert out[0].isnan()
    assert out[1] == 0


@every_count
@pytest.mark.parametrize("has_base", [True, False])
def test_gram_matrices_are_float64(kernel_path: str, count: int, has_base: bool) -> None:
    base, *others = models(count)
    gram = torch.ones(3, 3, dtype=torch.float64)
    add_gram(others, base if has_base else None, gram)
    stacked = torch.stack([x.double() - (base.double() if has_base else 0) for x in others])
    torch.testing.assert_close(gram.tril(), (stacked @ stacked.T + 1).tril(), rtol=1e-12, atol=1e-12)


@every_count
def test_sums_of_magnitudes_with_and_without_the_mask(kernel_path: str, count: int) -> None:
    base, x, *_ = models(count)
    mask = masks(count)[1]
    assert mask is not None
    sums = torch.ones(2, dtype=torch.float64)
    add_absolute_sums(x, base, mask, sums)
    size = (x.float() - base.float()).abs().double()
    torch.testing.assert_close(sums, torch.stack([size.sum() + 1, (size * mask).sum() + 1]), rtol=1e-12, atol=0.0)
