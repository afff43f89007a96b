"""Every merge method: its function, what inputs it takes, and its parameters with their defaults."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from entrenar.core.errors import InputError
from entrenar.merging.methods.arcee_fusion import arcee_fusion
from entrenar.merging.methods.elementwise import nearswap, ram
from entrenar.merging.methods.linear import linear, passthrough
from entrenar.merging.methods.measured import fisher, regmean
from entrenar.merging.methods.sce import sce
from entrenar.merging.methods.spherical import karcher, model_stock, multislerp, nuslerp, slerp
from entrenar.merging.methods.task_vectors import (
    RESCALES,
    TIES_CONVENTIONS,
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    task_arithmetic,
    ties,
)
from entrenar.merging.stack import Combine, Options, Stack

Base = Literal["required", "optional", "ignored"]
Statistic = Literal["squared gradients", "input products"]
_REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        kind: float, int, bool or str; a float takes an int too.
        default: without one it must be given.
        each: whether every model (but the base) has its own.
        low, high: the range allowed, its ends included. choices: of a str.
        is_inert: read from mergekit's configs, where it says how to compute and not what.
    """

    kind: type
    default: Any = _REQUIRED
    is_per_model: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    is_inert: bool = False

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is _REQUIRED

    def check(self, name: str, value: Any, where: str) -> Any:
        """The value as the method takes it; InputError says what is allowed."""
        if value is None and self.default is None:
            return None
        value = self._read(value)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            raise InputError(f"{where}: parameter {name!r} is {_shown(value)} but must be a {_KINDS[self.kind]}")
        if self.choices and value not in self.choices:
            raise InputError(
                f"{where}: parameter {name!r} is {str(value)[:80]!r} but must be one of {', '.join(self.choices)}"
            )
        if self.kind in (float, int) and not self._in_range(value):
            raise InputError(f"{where}: parameter {name!r} is {value!r} but must be {self._bounds()}")
        return value

    def _read(self, value: Any) -> Any:
        """As mergekit reads it: numbers in text, whole numbers written as 1.0, 1 and 0 for true and false."""
        if isinstance(value, str) and self.kind is not str:
            if self.kind is bool:
                return _TRUTH.get(value.strip().lower(), value)
            if not _NUMBER.fullmatch(value.strip()):
                return value
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        if self.kind is float:
            return float(value) if abs(value) <= _LARGEST else value
        if self.kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        return bool(value) if self.kind is bool and value in (0, 1) else value

    def _in_range(self, value: Any) -> bool:
        above = self.low is None or value >= self.low
        return above and (self.high is None or value <= self.high) and abs(value) < float("inf")

    def _bounds(self) -> str:
        ends = (("at least", self.low), ("at most", self.high))
        return " and ".join(f"{word} {end:g}" for word, end in ends if end is not None) or "a finite number"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


_MOST_SHOWN = 80
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_LARGEST = 10**300
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_KINDS = {float: "number", int: "whole number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Method:
    """One row of the registry; `least` and `most` count the models without the base.

    `statistic`: what is to be measured of every model on a text before it can be merged.
    """

    name: str
    function: Callable[[Stack, Options], Combine]
    base: Base
    parameters: Mapping[str, Parameter]
    least: int = 1
    most: int | None = None
    whole_rows: bool = False
    statistic: Statistic | None = None

    def parameter(self, name: str, where: str) -> Parameter:
        """A parameter by name; InputError with the nearest one."""
        if name not in self.parameters:
            known = ", ".join(self.parameters) or "none"
            raise InputError(
                f"{where}: {self.name} does not read the parameter {name!r}{_hint(name, list(self.parameters))}: it "
                f"reads {known}"
            )
        return self.parameters[name]

    def check_inputs(self, models: int, has_base: bool, where: str) -> None:
        """InputError unless the method takes so many models and this base."""
        if self.base == "required" and not has_base:
            raise InputError(f"{where}: {self.name} needs a base_model, from which the others' changes are taken")
        if models < self.least or (self.most is not None and models > self.most):
            allowed = f"{self.least}" if self.most == self.least else f"at least {self.least}"
            besides = " besides the base" if self.base == "required" else ""
            raise InputError(f"{where}: {self.name} takes {allowed} models{besides}, here are {models}")


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


_WEIGHT = {"weight": Parameter(float, is_per_model=True)}
_DENSITY = {"density": Parameter(float, 1.0, is_per_model=True, low=0, high=1)}


def _task_vectors(*, normalize: bool, rescale: bool | None = None) -> dict[str, Parameter]:
    """What the whole family reads; rescale None: nothing is thinned out."""
    shared = {
        "normalize": Parameter(bool, normalize),
        "lambda": Parameter(float, 1.0),
        "int8_mask": Parameter(bool, False, is_inert=True),
    }
    thinned = {"rescale": Parameter(bool, rescale), "dare_rescale": Parameter(str, "l1", choices=RESCALES)}
    return _WEIGHT | shared if rescale is None else _WEIGHT | _DENSITY | shared | thinned


_CONVENTION = {"ties": Parameter(str, "mergekit", choices=TIES_CONVENTIONS)}
_GAMMA = {"gamma": Parameter(float, 0.01, is_per_model=True, low=0, high=1)}
_EPSILON = {"epsilon": Parameter(float, 0.15, is_per_model=True, low=0, high=1)}
_MEASURED = {"weight": Parameter(float, 1.0, is_per_model=True, low=0), "text": Parameter(str, None, is_per_model=True)}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", linear, "ignored", _WEIGHT | {"normalize": Parameter(bool, True)}),
        Method("passthrough", passthrough, "ignored", {"scale": Parameter(float, None, is_per_model=True)}, most=1),
        Method("task_arithmetic", task_arithmetic, "required", _task_vectors(normalize=False)),
        Method("ties", ties, "required", _task_vectors(normalize=True, rescale=False) | _CONVENTION),
        Method("dare_linear", dare_linear, "required", _task_vectors(normalize=False, rescale=True)),
        Method("dare_ties", dare_ties, "required", _task_vectors(normalize=False, rescale=True) | _CONVENTION),
        Method("della_linear", della_linear, "required",
               _task_vectors(normalize=False, rescale=True) | _EPSILON, whole_rows=True),
        Method("della", della, "required",
               _task_vectors(normalize=True, rescale=True) | _EPSILON | _CONVENTION, whole_rows=True),
        Method("breadcrumbs", breadcrumbs, "required", _task_vectors(normalize=False, rescale=False) | _GAMMA),
        Method("breadcrumbs_ties", breadcrumbs_ties, "required",
               _task_vectors(normalize=False, rescale=False) | _GAMMA | _CONVENTION),
        Method("slerp", slerp, "required", {"t": Parameter(float)}, most=1),
        Method("nuslerp", nuslerp, "optional", _WEIGHT | {
            "nuslerp_flatten": Parameter(bool, True), "nuslerp_row_wise": Parameter(bool, False),
        }, least=2, most=2, whole_rows=True),
        Method("multislerp", multislerp, "optional", _WEIGHT | {
            "normalize_weights": Parameter(bool, True), "eps": Parameter(float, 1e-8, low=0),
        }),
        Method("karcher", karcher, "ignored", {
            "max_iter": Parameter(int, 10, low=1), "tol": Parameter(float, 1e-5, low=0),
        }),
        Method("model_stock", model_stock, "required", {"filter_wise": Parameter(bool, False)},
               least=2, whole_rows=True),
        Method("sce", sce, "required", {
            "select_topk": Parameter(float, 1.0, low=0, high=1), "int8_mask": Parameter(bool, False, is_inert=True),
        }),
        Method("nearswap", nearswap, "required", {"t": Parameter(float, low=0)}, most=1),
        Method("arcee_fusion", arcee_fusion, "required", {}, most=1, whole_rows=True),
        Method("ram", ram, "required", {"epsilon": Parameter(float, 1e-5, low=0)}),
        Method("fisher", fisher, "ignored", _MEASURED, statistic="squared gradients"),
        Method("regmean", regmean, "ignored", _MEASURED | {"alpha": Parameter(float, 0.9, low=0, high=1)},
               whole_rows=True, statistic="input products"),
    )
}  # fmt: skip


def method_named(name: str, where: str) -> Method:
    """A method by name; InputError with the nearest one."""
    if name not in METHODS:
        raise InputError(
            f"{where}: unknown merge_method {name!r}{_hint(name, list(METHODS))}: the methods are {', '.join(METHODS)}"
        )
    return METHODS[name]
