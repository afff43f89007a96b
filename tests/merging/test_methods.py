"""Every method against an oracle in float64 NumPy, bf16 to one rounding, and what must hold whatever the numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.merging.in_memory import merge_tensors
from entrenar.merging.registry import METHODS
from tests.support import merge_oracle as oracle

W = [0.75, 0.5, 0.25]  # exact in every type: a vote is not decided by how a weight is rounded
SHAPE = (23, 47)
Oracle = Callable[[list[oracle.Array], oracle.Array], oracle.Array]


def deltas(models: list[oracle.Array], base: oracle.Array) -> list[oracle.Array]:
    return [model - base for model in models]


def on(
    sparse: Callable[..., oracle.Array], finish: Callable[..., oracle.Array], *arguments: Any, **options: Any
) -> Oracle:
    """An oracle of the task-vector family: thin out every δ, then finish."""
    return lambda models, base: finish(base, [sparse(d, *arguments) for d in deltas(models, base)], W, **options)


def measured(columns: int | None = None) -> list[Tensor]:
    """Statistics of three models: squares in the tensors' shape with zeros among them, or products of inputs."""
    generator = torch.Generator().manual_seed(9)
    if columns is None:
        squares = [torch.randn(SHAPE, generator=generator).square() for _ in range(3)]
        return [square * (torch.arange(SHAPE[1]) % 5 > 0) for square in squares]
    inputs = [torch.randn(3 * columns, columns, generator=generator) for _ in range(3)]
    return [x.T @ x / len(x) for x in inputs]


SQUARES, PRODUCTS = measured(), measured(SHAPE[1])


def wide(tensors: list[Tensor]) -> list[oracle.Array]:
    return [tensor.double().numpy() for tensor in tensors]


# method, models, with a base, its parameters, the oracle
CASES: list[tuple[str, int, bool, dict[str, Any], Oracle]] = [
    ("linear", 3, False, {"weight": W}, lambda m, _: oracle.linear(m, W)),
    ("linear", 3, False, {"weight": W, "normalize": False}, lambda m, _: oracle.linear(m, W, normalize=False)),
    ("passthrough", 1, False, {"scale": 1.5}, lambda m, _: 1.5 * m[0]),
    ("task_arithmetic", 3, True, {"weight": W, "lambda": 0.8}, on(oracle.trimmed, oracle.summed, 1.0, lam=0.8)),
    ("task_arithmetic", 3, True, {"weight": W, "normalize": True},
     on(oracle.trimmed, oracle.summed, 1.0, normalize=True)),
    ("ties", 3, True, {"weight": W, "density": 0.4}, on(oracle.trimmed, oracle.elected, 0.4)),
    ("ties", 3, True, {"weight": W, "density": 0.4, "ties": "paper"},
     on(oracle.trimmed, oracle.elected, 0.4, ties="paper")),
    ("ties", 3, True, {"weight": W, "density": 0.4, "ties": "peft"},
     on(oracle.trimmed, oracle.elected, 0.4, ties="peft")),
    ("ties", 3, True, {"weight": W, "normalize": False}, on(oracle.trimmed, oracle.elected, 1.0, normalize=False)),
    ("breadcrumbs", 3, True, {"weight": W, "density": 0.5, "gamma": 0.1}, on(oracle.band, oracle.summed, 0.5, 0.1)),
    ("breadcrumbs_ties", 3, True, {"weight": W, "density": 0.97, "gamma": 0.1},
     on(oracle.band, oracle.elected, 0.97, 0.1, normalize=False)),
    ("dare_linear", 3, True, {"weight": W}, on(oracle.trimmed, oracle.summed, 1.0)),
    ("dare_ties", 3, True, {"weight": W}, on(oracle.trimmed, oracle.elected, 1.0, normalize=False)),
    ("della_linear", 3, True, {"weight": W}, on(oracle.trimmed, oracle.summed, 1.0)),
    ("della", 3, True, {"weight": W}, on(oracle.trimmed, oracle.elected, 1.0)),
    ("slerp", 1, True, {"t": 0.3}, lambda m, base: oracle.slerp(base, m[0], 0.3)),
    ("nuslerp", 2, False, {"weight": W[:2]}, lambda m, _: oracle.nuslerp(m, W, None, None)),
    ("nuslerp", 2, True, {"weight": W[:2]}, lambda m, base: oracle.nuslerp(m, W, base, None)),
    ("nuslerp", 2, True, {"weight": W[:2], "nuslerp_flatten": False}, lambda m, base: oracle.nuslerp(m, W, base, 0)),
    ("nuslerp", 2, False, {"weight": W[:2], "nuslerp_flatten": False, "nuslerp_row_wise": True},
     lambda m, _: oracle.nuslerp(m, W, None, 1)),
    ("multislerp", 3, False, {"weight": W}, lambda m, _: oracle.multislerp(m, W, None)),
    ("multislerp", 3, True, {"weight": W}, lambda m, base: oracle.multislerp(m, W, base)),
    ("karcher", 3, False, {"max_iter": 100, "tol": 1e-9}, lambda m, _: oracle.karcher(m)),
    ("model_stock", 3, True, {}, oracle.model_stock),
    ("sce", 3, True, {"select_topk": 0.4}, lambda m, base: oracle.sce(m, base, 0.4)),
    ("sce", 3, True, {}, lambda m, base: oracle.sce(m, base, 1.0)),
    ("nearswap", 1, True, {"t": 0.02}, lambda m, base: oracle.nearswap(m[0], base, 0.02)),
    ("arcee_fusion", 1, True, {}, lambda m, base: oracle.arcee_fusion(m[0], base)),
    ("ram", 3, True, {"epsilon": 0.05}, lambda m, base: oracle.ram(m, base, 0.05)),
    ("fisher", 3, False, {"weight": W, "statistics": SQUARES}, lambda m, _: oracle.fisher(m, wide(SQUARES), W)),
    ("regmean", 3, False, {"weight": W, "statistics": PRODUCTS},
     lambda m, _: oracle.regmean(m, wide(PRODUCTS), W, 0.9)),
    ("regmean", 3, False, {"weight": W, "statistics": PRODUCTS, "alpha": 0.2},
     lambda m, _: oracle.regmean(m, wide(PRODUCTS), W, 0.2)),
]  # fmt: skip
every_case = pytest.mark.parametrize(
    ("method", "count", "has_base", "parameters", "expected"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)


def inputs(
    count: int, dtype: torch.dtype = torch.float32, seed: int = 0, shape: tuple[int, ...] = SHAPE
) -> list[Tensor]:
    """The base, then models near it."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [t.to(dtype) for t in (base, *(base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)))]


def merged(method: str, models: Any, base: Any = None, **parameters: Any) -> Tensor:
    result = merge_tensors(method, models, base, **parameters)
    assert isinstance(result, Tensor)
    return result


def test_every_method_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(METHODS)


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and native.path() == "reference":
        pytest.skip("the native library is not built")
    return native.path() if request.param == "native" else "reference"


@every_case
def test_float32_against_the_oracle(
    method: str, count: int, has_base: bool, parameters: dict[str, Any], expected: Oracle, path: str
) -> None:
    base, *models = inputs(count)
    with native.using(path):
        ours = merged(method, models, base if has_base else None, **parameters)
    theirs = expected([m.double().numpy() for m in models], base.double().numpy())
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=2e-6, atol=2e-6)


@every_case
def test_bf16_in_and_out_is_rounded_once(
    method: str, count: int, has_base: bool, parameters: dict[str, Any], expected: Oracle
) -> None:
    base, *models = inputs(count, torch.bfloat16)
    ours = merged(method, models, base if has_base else None, **parameters)
    assert ours.dtype == torch.bfloat16
    theirs = expected([m.double().numpy() for m in models], base.double().numpy())
    half_a_unit = np.abs(theirs) * 2.0**-8 + 2e-6
    wrong = np.abs(ours.double().numpy() - theirs) > half_a_unit * 1.001
    assert wrong.mean() <= (0.01 if method in ("arcee_fusion", "sce") else 0)  # importances that tie


@every_case
def test_equal_models_give_themselves(
    method: str, count: int, has_base: bool, parameters: dict[str, Any], expected: Oracle
) -> None:
    x, *_ = inputs(0)
    parameters = {**parameters, "normalize": True} if "normalize" in METHODS[method].parameters else dict(parameters)
    parameters.pop("scale", None)
    ours = merged(method, [x] * count, x if has_base else None, **parameters)
    torch.testing.assert_close(ours, x, rtol=3e-7, atol=3e-7)


INDIFFERENT = [case for case in CASES if case[1] == 3 and case[0] not in ("arcee_fusion",)]


@pytest.mark.parametrize(("method", "count", "has_base", "parameters", "expected"), INDIFFERENT)
def test_the_order_of_models_does_not_matter(
    method: str, count: int, has_base: bool, parameters: dict[str, Any], expected: Oracle
) -> None:
    base, a, b, c = inputs(3)
    own = [name for name in ("weight", "statistics") if name in parameters]
    by_name = {name: dict(zip("abc", parameters[name], strict=True)) for name in own}
    first = merged(method, {"a": a, "b": b, "c": c}, base if has_base else None, **parameters | by_name)
    second = merged(method, {"c": c, "a": a, "b": b}, base if has_base else None, **parameters | by_name)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_masks_follow_the_models_name_not_its_place(method: str) -> None:
    base, a, b = inputs(2)
    first = merged(method, {"a": a, "b": b}, base, density=0.5)
    second = merged(method, {"b": b, "a": a}, base, density=0.5)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    other = merged(method, {"a": a, "b": b}, base, density=0.5, seed=1)
    assert not torch.equal(first, other)


def test_slerp_ends_at_its_ends_to_the_bit() -> None:
    base, model = inputs(1)
    assert torch.equal(merged("slerp", [model], base, t=0), base)
    assert torch.equal(merged("slerp", [model], base, t=1), model)


def test_ties_of_density_1_without_conflict_is_task_arithmetic() -> None:
    base, first, _ = inputs(2)
    second = base + 0.5 * (first - base)
    both = merged("ties", [first, second], base, normalize=False)
    torch.testing.assert_close(both, merged("task_arithmetic", [first, second], base), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rescale", ["l1", "inverse_density"])
@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_a_random_part_is_kept_and_scaled_up(method: str, rescale: str) -> None:
    base, model = inputs(1, shape=(200, 301))
    density = 0.3
    change = merged(method, [model], base, density=density, dare_rescale=rescale).double() - base.double()
    delta = model.double() - base.double()
    kept = change.abs() > 0
    assert abs(kept.double().mean() - density) < 4 * (density * (1 - density) / kept.numel()) ** 0.5 + 1e-3
    factor = (change / delta)[kept & (delta.abs() > 1e-2)]
    torch.testing.assert_close(factor, factor.mean().expand_as(factor), rtol=1e-4, atol=1e-4)
    if rescale == "l1":
        torch.testing.assert_close(change.abs().sum(), delta.abs().sum(), rtol=1e-6, atol=0.0)
    else:
        assert abs(factor.mean() - 1 / density) < 1e-4


def test_della_keeps_the_larger_more_often() -> None:
    base, model = inputs(1, shape=(400, 200))
    delta = (model - base).abs()
    kept = (merged("della_linear", [model], base, density=0.5, epsilon=0.3, rescale=False) != base).float()
    ranks = delta.argsort(dim=1).argsort(dim=1)
    for low in range(0, 200, 50):
        part = (ranks >= low) & (ranks < low + 50)
        likely = 0.2 + 0.6 * (low + 24.5) / 199
        assert abs(kept[part].mean() - likely) < 0.02


def test_regmean_with_alpha_1_is_the_least_squares_fit_of_every_models_outputs() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs_of = [torch.randn(60, 7, generator=generator).double() for _ in range(2)]
    models = [torch.randn(4, 7, generator=generator).double() for _ in range(2)]
    ours = merged("regmean", models, statistics=[x.T @ x for x in inputs_of], alpha=1)
    outputs = torch.cat([x @ model.T for x, model in zip(inputs_of, models, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs_of), outputs).solution.T
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_regmean_averages_what_is_no_linear_layer() -> None:
    tables = [{"norm": torch.full((5,), float(i)), "other": torch.full((3, 2), float(i))} for i in (1, 3)]
    result = merge_tensors("regmean", tables, statistics=[{}, {}], weight=[1, 3])
    assert isinstance(result, dict)
    assert result["norm"].tolist() == [2.5] * 5
    assert result["other"].unique().tolist() == [2.5]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99), levels=st.integers(1, 4),
    density=st.floats(0.01, 1.0),
)  # fmt: skip
def test_ties_at_the_threshold_go_by_index(rows: int, columns: int, seed: int, levels: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.zeros(rows, columns)
    model = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).float()
    ours = merged("ties", [model], base, density=density)
    np.testing.assert_array_equal(ours.numpy(), oracle.trimmed(model.double().numpy(), density))


def test_models_may_be_dicts_of_tensors() -> None:
    (x, y), (base_x, base_y) = inputs(1), inputs(1, seed=5)
    result = merge_tensors("ties", {"m": {"x": x, "y": y}}, {"x": base_x, "y": base_y}, density=0.5)
    assert isinstance(result, dict)
    assert torch.equal(result["x"], merged("ties", [x], base_x, density=0.5))
    again = merge_tensors("ties", {"x": x, "y": y}, {"x": base_x, "y": base_y}, density=0.5)
    assert isinstance(again, dict)
    assert torch.equal(result["y"], again["y"])


@pytest.mark.parametrize(
    ("method", "count", "has_base", "parameters", "sentence"),
    [
        ("tees", 1, True, {}, r"unknown merge_method 'tees' \(did you mean 'ties'\?\)"),
        ("ties", 1, True, {"densty": 0.5}, r"does not read the parameter 'densty' \(did you mean 'density'\?\)"),
        ("ties", 1, True, {"density": 1.5}, "'density' is 1.5 but must be at least 0 and at most 1"),
        ("ties", 1, True, {"ties": "papr"}, "must be one of mergekit, paper, peft"),
        ("ties", 1, False, {}, "ties needs a base_model"),
        (
            "slerp",
            2,
            True,
            {"t": 0.5},
            "slerp takes at least 1 models|slerp takes 1 models besides the base, here are 2",
        ),
        ("slerp", 1, True, {}, "slerp needs the parameter 't'"),
        ("model_stock", 1, True, {}, "at least 2 models besides the base"),
        ("della", 1, True, {"density": 0.9, "epsilon": 0.2}, r"density 0.9 ± epsilon 0.2 leaves \(0, 1\)"),
        ("linear", 2, False, {"weight": [1.0, -1.0]}, "weights of .* add up to 0"),
        ("linear", 2, False, {"weight": [1.0]}, "weight has 1 values for 2 models"),
        ("linear", 2, False, {"statistics": SQUARES[:2]}, "linear does not read statistics"),
        ("fisher", 2, False, {}, "fisher of tensors needs their squared gradients: give them as statistics=…"),
        ("fisher", 2, False, {"text": "a.txt", "statistics": SQUARES[:2]}, "needs their squared gradients"),
        ("regmean", 3, False, {"statistics": PRODUCTS[:2]}, "statistics are given for 0, 1, the models are 0, 1, 2"),
        ("fisher", 2, False, {"weight": [0, 0], "statistics": SQUARES[:2]}, "add up to 0: give one above 0"),
        ("fisher", 2, False, {"weight": [1, -1], "statistics": SQUARES[:2]}, "'weight' is -1.0 but must be at least 0"),
        ("regmean", 2, False, {"statistics": [torch.zeros(47, 47)] * 2}, "leave nothing to solve for"),
    ],
)
def test_mistakes_are_told(method: str, count: int, has_base: bool, parameters: dict[str, Any], sentence: str) -> None:
    base, *models = inputs(count)
    with pytest.raises(InputError, match=sentence):
        merged(method, models, base if has_base else None, **parameters)


def test_shapes_that_differ_are_told() -> None:
    with pytest.raises(InputError, match="different shapes"):
        merged("linear", [torch.zeros(2, 3), torch.zeros(3, 2)])
    with pytest.raises(InputError, match="not every model has y"):
        merge_tensors("linear", [{"x": torch.zeros(2)}, {"x": torch.zeros(2), "y": torch.zeros(2)}])


def test_a_nan_is_not_hidden() -> None:
    base, model = inputs(1)
    model[3, 4] = torch.nan
    assert merged("ties", [model], base, density=0.1)[3, 4].isnan()
