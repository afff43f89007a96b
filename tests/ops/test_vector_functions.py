"""The float functions under the elementwise kernels (csrc/common/exp.h, tanh.h, normal.h), over all of float32."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from entrenar import native
from tests.support.compare import spacing

NATIVE = [path for path in native.supported_paths() if path != "reference"]
pytestmark = pytest.mark.parametrize("path", NATIVE)
CALL = native.Function("function")


def normal_cumulative(x: Tensor) -> Tensor:
    return torch.special.erfc(x * -(0.5**0.5)) / 2


@dataclass(frozen=True)
class Case:
    """A function: its number in csrc/elementwise/kernels.h, the exact one, ulps allowed, where to look closely."""

    number: int
    exact: Callable[[Tensor], Tensor]
    ulps: float
    low: float
    high: float


CASES = {
    "exp": Case(0, torch.exp, 2.3, -104, 88.8),
    "tanh": Case(1, torch.tanh, 3.5, -10, 10),
    "normal": Case(2, normal_cumulative, 8.0, -14.5, 6),
}


def compute(path: str, case: Case, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    with native.using(path):
        CALL(x, out, x.numel(), case.number)
    return out


def every_float(step: int) -> Tensor:
    """All float32 bit patterns, NaNs and denormals among them, at a step that is not a power of two."""
    return torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32).view(torch.float32)


def errors(case: Case, x: Tensor, found: Tensor) -> Tensor:
    """In units of the last place of the exact result; where that is beyond the largest float, infinity is right."""
    exact = case.exact(x.double())
    error = (found.double() - exact).abs() / spacing(exact, torch.float32)
    return torch.where(found.isinf() & (exact > torch.finfo(torch.float32).max), 0.0, error)


@pytest.mark.parametrize("name", list(CASES))
def test_over_all_floats_the_error_is_a_few_units_in_the_last_place(path: str, name: str) -> None:
    case, x = CASES[name], every_float(4093)
    found = compute(path, case, x)
    assert torch.equal(found.isnan(), x.isnan())
    finite = x.isfinite()
    assert errors(case, x[finite], found[finite]).max() <= case.ulps


@pytest.mark.parametrize("name", list(CASES))
def test_where_the_function_is_neither_flat_nor_trivial(path: str, name: str) -> None:
    case = CASES[name]
    x = torch.empty(1_000_003).uniform_(case.low, case.high, generator=torch.Generator().manual_seed(0))
    assert errors(case, x, compute(path, case, x)).max() <= case.ulps


def test_exp_of_special_values(path: str) -> None:
    infinity = float("inf")
    x = torch.tensor([0.0, -0.0, infinity, -infinity, 1e30, -1e30, 88.73, -103.98, -1e-45, 88.72283])
    found = compute(path, CASES["exp"], x)
    assert found[:8].tolist() == [1.0, 1.0, infinity, 0.0, infinity, 0.0, infinity, 0.0]
    assert found[8] == 1.0
    assert found[9].isfinite()


def test_tanh_and_the_normal_distribution_at_their_ends(path: str) -> None:
    x = torch.tensor([float("inf"), -float("inf"), 1e30, -1e30, 0.0, -0.0])
    tanh, normal = (compute(path, CASES[name], x) for name in ("tanh", "normal"))
    assert tanh.tolist() == [1.0, -1.0, 1.0, -1.0, 0.0, 0.0]
    assert torch.equal(tanh.signbit(), x.signbit())
    assert normal.tolist() == [1.0, 0.0, 1.0, 0.0, 0.5, 0.5]
