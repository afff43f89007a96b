"""Which memory a run will need, and what it gives up to fit: rows at a time, and what decoder layers keep.

Giving up costs time. A smaller micro-batch decodes every weight more often; a layer that keeps less computes again.
The plan is the fastest of those that fit, by estimates of both.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from entrenar.layers.residual_blocks import Keep

# Share of a step's time that computing again adds, were it done in every layer (measured: docs/performance.md).
_AGAIN = {Keep.ALL: 0.0, Keep.DEAR: 0.03, Keep.NOTHING: 0.28}
_WORDS = {Keep.DEAR: "keep only what is dear to compute again", Keep.NOTHING: "keep their input alone"}
# What a heap that is cut up by tensors of many sizes takes for each byte of them (measured with glibc 2.36).
HEAP = 1.15
_OVERHEAD_TOKENS = 96  # what a micro-batch costs beside its tokens: decoding all weights


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes that do not depend on the batch. `libraries`: what the process held before the model was loaded."""

    libraries: int
    base: int
    adapter: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.libraries + self.base + self.adapter + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Working:
    """Bytes that depend on the batch.

    kept: bytes a token between forward and backward if all `layers` keep that much, from the fastest to the leanest.
    logits: of one chunk of the loss, bytes at most. scratch: of the kernels, whatever the batch.
    heap: what the allocator takes for each byte. passing: bytes that a layer's backward makes for each that the layer
    keeps at most.
    """

    layers: int
    kept: Mapping[Keep, int]
    logits: int
    scratch: int
    heap: float = HEAP
    passing: float = 2.0

    def of_layers(self, keep: Sequence[Keep]) -> float:
        """Bytes a token that are held when the backward begins."""
        if not keep:
            return self.kept[Keep.ALL]
        leanest = min(self.kept.values())
        return leanest + sum((self.kept[choice] - leanest) / self.layers for choice in keep)

    def of_a_moment(self, keep: Sequence[Keep]) -> float:
        """Bytes a token that the backward of the last layer takes, where most is held: what it makes again, and what
        passes: gradients of what it computes, and what they are made of.
        """
        if not keep:
            return 0.0
        most = max(self.kept.values())
        return (self.passing * (most - min(self.kept.values())) + most - self.kept[keep[-1]]) / self.layers


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run will do and hold. `tokens`: of its largest micro-batch; `keep`: layer by layer; bytes."""

    micro_batch: int
    tokens: int
    keep: tuple[Keep, ...]
    held: Held
    activations: int
    working: int
    budget: int | None

    @property
    def total(self) -> int:
        """Peak of anonymous memory, bytes."""
        return self.held.total + self.activations + self.working

    @property
    def fits(self) -> bool:
        """Whether it stays within the budget."""
        return self.budget is None or self.total <= self.budget

    @property
    def time(self) -> float:
        """Estimate of a step's time relative to one that gives nothing up."""
        again = sum(_AGAIN[choice] for choice in self.keep) / max(len(self.keep), 1)
        return (1 + again) * (1 + _OVERHEAD_TOKENS / self.tokens)

    def sentence(self) -> str:
        """The plan in words."""
        counts = Counter(self.keep)
        given_up = [f"{counts[keep]} of {len(self.keep)} layers {_WORDS[keep]}" for keep in _WORDS if counts[keep]]
        layers = ", ".join(given_up) or "nothing is computed twice"
        bound = "" if self.budget is None else f" of {self.budget / 1e9:.1f} GB"
        return f"memory: about {self.total / 1e9:.2f} GB{bound}; {self.micro_batch} rows at a time; {layers}"


def make_memory_plan(
    held: Held, working: Working, tokens: Mapping[int, int], budget: int | None, *, least: bool = False
) -> MemoryPlan:
    """The fastest plan within `budget` (None: no bound); the leanest of all if none fits, or if `least` asks for it.

    Args:
        tokens: micro-batches to choose from, each with the tokens of its largest one.
    """
    plans = [
        _plan(held, working, micro_batch, count, keep, budget)
        for micro_batch, count in tokens.items()
        for keep in _choices(list(working.kept), working.layers)
    ]
    fitting = [plan for plan in plans if plan.fits]
    if least or not fitting:
        return min(plans, key=lambda plan: (plan.total, plan.time))
    return min(fitting, key=lambda plan: (plan.time, plan.total))


def _plan(
    held: Held, working: Working, micro_batch: int, tokens: int, keep: tuple[Keep, ...], budget: int | None
) -> MemoryPlan:
    moment = max(working.logits, working.heap * tokens * working.of_a_moment(keep))
    return MemoryPlan(
        micro_batch=micro_batch, tokens=tokens, keep=keep, held=held,
        activations=round(working.heap * tokens * working.of_layers(keep)), working=round(moment + working.scratch),
        budget=budget,
    )  # fmt: skip


def _choices(ladder: Sequence[Keep], layers: int) -> Iterable[tuple[Keep, ...]]:
    """All layers at the top of the ladder, then one after the other, the first layers first, a rung down."""
    yield (ladder[0],) * layers
    for upper, lower in pairwise(ladder):
        for count in range(1, layers + 1):
            yield (lower,) * count + (upper,) * (layers - count)
