"""Task vectors δ = x − base, thinned out, weighted, summed with or without an election of signs, added to the base.

Ilharco et al. 2023 (task arithmetic); Yadav et al. 2023 (TIES: the largest stay, signs are elected); Yu et al. 2024
(DARE: a random part stays, scaled up); Davari and Belilovsky 2023 (breadcrumbs: neither the largest nor the smallest
stay); Deep et al. 2024 (DELLA: a random part, the likelier the larger). Ties at a threshold go by index.

With d = weight · δ of what is kept: without an election y = base + lambda · Σd, over Σ weights with `normalize`. With
one, an element's sign is that of Σd (plus for 0), only d of that sign count, and `normalize` divides by their weights.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.merging.stack import Combine, Options, Piece, Stack
from entrenar.merging.thresholds import Threshold, largest
from entrenar.ops.merge.masks import keep_by_rank, keep_random, keep_top
from entrenar.ops.merge.sums import Vote, add_absolute_sums, task_sum

TIES_CONVENTIONS = ("mergekit", "paper", "peft")
RESCALES = ("l1", "inverse_density")
_LEAST_SUM = 1e-7  # of magnitudes; below, nothing is scaled up (as mergekit has it)


class MaskRule(Protocol):
    """Which elements of one task vector stay; asked piece by piece, in order, once or more."""

    def fill(self, piece: Piece, x: Tensor, mask: Tensor) -> None:
        """mask (n,) uint8 = whether an element of x − base stays."""
        ...


def task_arithmetic(stack: Stack, options: Options) -> Combine:
    """All of every task vector, summed."""
    return _merge(stack, options, [None] * len(stack.models), elect=False)


def ties(stack: Stack, options: Options) -> Combine:
    """The `density` largest of each, signs elected; `ties` names whose convention."""
    return _merge(stack, options, _largest(stack, options["density"]), elect=True)


def dare_linear(stack: Stack, options: Options) -> Combine:
    """A random `density` of each, scaled up, summed."""
    return _merge(stack, options, _random(stack, options["density"]), elect=False)


def dare_ties(stack: Stack, options: Options) -> Combine:
    """A random `density` of each, scaled up, signs elected."""
    return _merge(stack, options, _random(stack, options["density"]), elect=True)


def della_linear(stack: Stack, options: Options) -> Combine:
    """A random `density` of each, likelier where |δ| ranks high in its row, scaled up, summed."""
    return _merge(stack, options, _by_rank(stack, options), elect=False)


def della(stack: Stack, options: Options) -> Combine:
    """The same with signs elected."""
    return _merge(stack, options, _by_rank(stack, options), elect=True)


def breadcrumbs(stack: Stack, options: Options) -> Combine:
    """Of each the `density` below its `gamma` largest, summed."""
    return _merge(stack, options, _band(stack, options), elect=False)


def breadcrumbs_ties(stack: Stack, options: Options) -> Combine:
    """The same with signs elected."""
    return _merge(stack, options, _band(stack, options), elect=True)


@dataclass(frozen=True)
class _Top:
    """The largest magnitudes, without those above `outer` if there is one."""

    inner: Threshold
    outer: Threshold | None
    ties: tuple[Tensor, Tensor]  # (1,) int64 each: wanted at the two thresholds in the rest of this pass

    def fill(self, piece: Piece, x: Tensor, mask: Tensor) -> None:
        bounds = (self.inner, self.outer)
        for bound, ties, outside in zip(bounds, self.ties, (False, True), strict=True):
            if bound is None:
                continue
            if piece.start == 0:
                ties.fill_(bound.ties)
            keep_top(x, piece.base, bound.bits, ties, mask, outside=outside)


@dataclass(frozen=True)
class _Nothing:
    """None of them."""

    def fill(self, piece: Piece, x: Tensor, mask: Tensor) -> None:  # noqa: ARG002 - MaskRule's signature
        mask.zero_()


@dataclass(frozen=True)
class _Sample:
    """Each element with the same probability."""

    key: tuple[int, int]
    density: float

    def fill(self, piece: Piece, x: Tensor, mask: Tensor) -> None:  # noqa: ARG002 - MaskRule's signature
        keep_random(self.key, piece.start, self.density, mask)


@dataclass(frozen=True)
class _RankedSample:
    """Each element with a probability that rises with its rank in its row."""

    key: tuple[int, int]
    low: float
    high: float
    columns: int
    known: dict[int, Any] = field(default_factory=dict)  # masks in bits by where they start: ranks cost a sort

    def fill(self, piece: Piece, x: Tensor, mask: Tensor) -> None:
        if piece.start in self.known:
            mask.copy_(torch.from_numpy(numpy.unpackbits(self.known.pop(piece.start), count=mask.numel())))
            return
        keep_by_rank(x, piece.base, self.columns, self.low, self.high, self.key, piece.start, mask)
        self.known[piece.start] = numpy.packbits(mask.numpy())


def _top(inner: Threshold, outer: Threshold | None) -> _Top:
    return _Top(inner, outer, (torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)))


def _thresholds(stack: Stack, indices: list[int], counts: list[list[int]]) -> list[list[Threshold]]:
    return largest(stack, lambda piece: [(piece.models[index], piece.base) for index in indices], counts)


def _largest(stack: Stack, densities: Sequence[float]) -> list[MaskRule | None]:
    thinned = [index for index, density in enumerate(densities) if density < 1]
    rules: list[MaskRule | None] = [None] * len(densities)
    if not thinned or not stack.numel:
        return rules
    counts = [[_kept(densities[index], stack.numel)] for index in thinned]
    for index, (threshold,) in zip(thinned, _thresholds(stack, thinned, counts), strict=True):
        rules[index] = _top(threshold, None)
    return rules


def _kept(density: float, n: int) -> int:
    """Of n elements; a density above 0 rules one at least."""
    return max(1, int(density * n)) if density > 0 else 0


def _band(stack: Stack, options: Options) -> list[MaskRule | None]:
    bounds = [_band_of(stack.numel, *pair) for pair in zip(options["density"], options["gamma"], strict=True)]
    thinned = [index for index, (top, end) in enumerate(bounds) if top > 0 or end < stack.numel]
    rules: list[MaskRule | None] = [None] * len(bounds)
    if not thinned:
        return rules
    counts = [[bounds[index][1], bounds[index][0]] for index in thinned]
    for index, (inner, outer) in zip(thinned, _thresholds(stack, thinned, counts), strict=True):
        rules[index] = _top(inner, outer)
    return rules


def _band_of(n: int, density: float, gamma: float) -> tuple[int, int]:
    """Ranks from the largest down, [begin, end), that stay."""
    if density >= 1:
        return 0, n
    count = int(density * n)
    bottom = max(0, n - count - int(gamma * n))
    return n - bottom - count, n - bottom


def _random(stack: Stack, densities: Sequence[float]) -> list[MaskRule | None]:
    return [
        None if density >= 1 else _Sample(stack.random_key(index), density) for index, density in enumerate(densities)
    ]


def _by_rank(stack: Stack, options: Options) -> list[MaskRule | None]:
    rules: list[MaskRule | None] = []
    for index, (density, epsilon) in enumerate(zip(options["density"], options["epsilon"], strict=True)):
        if density >= 1 or density <= 0:
            rules.append(None if density >= 1 else _Nothing())
            continue
        low, high = density - epsilon, density + epsilon
        if not (low > 0 and high < 1):
            raise InputError(
                f"della: density {density} ± epsilon {epsilon} leaves (0, 1) at {stack.name}: make epsilon smaller"
            )
        rules.append(_RankedSample(stack.random_key(index), low, high, stack.columns))
    return rules


def _merge(stack: Stack, options: Options, rules: list[MaskRule | None], *, elect: bool) -> Combine:
    vote = _vote(options, _rescales(stack, options, rules), elect)
    if any(math.isnan(value) or math.isinf(value) for value in vote.values):
        raise InputError(f"the weights of {stack.name} are not finite numbers: {list(vote.values)}")

    def combine(piece: Piece, out: Tensor) -> None:
        task_sum(piece.base, piece.models, _masks(piece, rules), vote, out)

    return combine


def _masks(piece: Piece, rules: list[MaskRule | None]) -> list[Tensor | None]:
    masks: list[Tensor | None] = []
    for index, (rule, x) in enumerate(zip(rules, piece.models, strict=True)):
        mask = None if rule is None else piece.mask(index)
        if rule is not None and mask is not None:
            rule.fill(piece, x, mask)
        masks.append(mask)
    return masks


def _rescales(stack: Stack, options: Options, rules: list[MaskRule | None]) -> list[float]:
    """What each thinned task vector is multiplied with; `l1` restores its sum of magnitudes."""
    if not options.get("rescale", False) or all(rule is None for rule in rules):
        return [1.0] * len(rules)
    if options.get("dare_rescale") == "inverse_density":
        return [1.0 if k is None or d == 0 else 1 / d for k, d in zip(rules, options["density"], strict=True)]
    sums = torch.zeros(len(rules), 2, dtype=torch.float64)
    for piece in stack.pieces():
        for index, mask in enumerate(_masks(piece, rules)):
            if mask is not None:
                add_absolute_sums(piece.models[index], piece.base, mask, sums[index])
    return [float(whole / thinned_sum) if min(whole, thinned_sum) >= _LEAST_SUM else 1.0 for whole, thinned_sum in sums]


def _vote(options: Options, rescales: list[float], elect: bool) -> Vote:
    weights: tuple[float, ...] = options["weight"]
    values = [weight * rescale for weight, rescale in zip(weights, rescales, strict=True)]
    scale = float(options["lambda"])
    if not elect:
        total = sum(weights) if options["normalize"] else 1.0
        return Vote(values=values, scale=scale / (total if abs(total) >= 1e-8 else 1.0))
    vote = _CONVENTIONS[options.get("ties", "mergekit")]
    return vote(values, list(weights), rescales, scale, bool(options["normalize"]))


def _mergekit(values: list[float], weights: list[float], rescales: list[float], scale: float, divide: bool) -> Vote:  # noqa: ARG001
    """Weighted votes, plus where they cancel, over the weights of those kept."""
    return Vote(values=values, votes=values, divisors=weights if divide else None, scale=scale)


def _paper(values: list[float], weights: list[float], rescales: list[float], scale: float, divide: bool) -> Vote:
    """Plain votes, nobody where they cancel, over the weights of those kept (at equal weights: their mean)."""
    divisors = weights if divide else None
    return Vote(values=values, votes=rescales, divisors=divisors, zero_is_positive=False, scale=scale)


def _peft(values: list[float], weights: list[float], rescales: list[float], scale: float, divide: bool) -> Vote:
    """Plain votes, nobody where they cancel, over the number of those kept."""
    divisors = [1.0] * len(weights) if divide else None
    return Vote(values=values, votes=rescales, divisors=divisors, zero_is_positive=False, scale=scale)


_CONVENTIONS: dict[str, Callable[[list[float], list[float], list[float], float, bool], Vote]] = {
    "mergekit": _mergekit,
    "paper": _paper,
    "peft": _peft,
}
