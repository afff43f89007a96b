"""Which memory a run will need, and what it gives up to fit: rows at a time, and what decoder layers save.

Giving up costs time. A smaller micro-batch dequantizes every weight more often; a layer that saves less computes again.
The plan is the fastest of those that fit, by estimates of memory and time.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from entrenar.layers.recompute import Recompute

# Share of a step's time that recomputing adds if every layer does it (measured: docs/performance.md).
_AGAIN = {Recompute.NOTHING: 0.0, Recompute.CHEAP: 0.03, Recompute.ALL: 0.28}
_WORDS = {Recompute.CHEAP: "compute norms and activations twice", Recompute.ALL: "save their input alone"}
# What a heap that is cut up by tensors of many sizes takes for each byte of them (measured with glibc 2.36).
HEAP = 1.15
_OVERHEAD_TOKENS = 96  # what a micro-batch costs beside its tokens: decoding all weights


@dataclass(frozen=True, kw_only=True)
class Fixed:
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
class Activations:
    """Bytes that depend on the batch.

    saved: for each level of recomputation the bytes a token that are held from forward to backward if all `layers` are
    at that level, from the fastest level to the leanest. logits: at most, of one chunk of the loss. scratch: of the
    kernels, whatever the batch. heap: what the allocator takes for each byte. transient: bytes that one layer's
    backward allocates for itself, for each byte that the layer saves at most.
    """

    layers: int
    saved: Mapping[Recompute, int]
    logits: int
    scratch: int
    heap: float = HEAP
    transient: float = 2.0

    def saved_by(self, recompute: Sequence[Recompute]) -> float:
        """Bytes a token that are held when the backward begins, layer by layer at these levels."""
        if not recompute:
            return self.saved[Recompute.NOTHING]
        smallest = min(self.saved.values())
        return smallest + sum((self.saved[level] - smallest) / self.layers for level in recompute)

    def transient_of(self, recompute: Sequence[Recompute]) -> float:
        """Bytes a token that the backward of the last layer adds. The peak is there, as nothing is freed yet: it holds
        what it computes again, the gradients of that, and their intermediate results.
        """
        if not recompute:
            return 0.0
        largest = max(self.saved.values())
        of_backward = self.transient * (largest - min(self.saved.values()))
        return (of_backward + largest - self.saved[recompute[-1]]) / self.layers


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a run will do and hold. `tokens`: of its largest micro-batch; `recompute`: layer by layer; bytes."""

    micro_batch: int
    tokens: int
    recompute: tuple[Recompute, ...]
    fixed: Fixed
    saved: int
    transient: int
    budget: int | None

    @property
    def total(self) -> int:
        """Peak of anonymous memory, bytes."""
        return self.fixed.total + self.saved + self.transient

    @property
    def fits(self) -> bool:
        """Whether it stays within the budget."""
        return self.budget is None or self.total <= self.budget

    @property
    def time(self) -> float:
        """Estimate of a step's time relative to one that gives nothing up."""
        again = sum(_AGAIN[level] for level in self.recompute) / max(len(self.recompute), 1)
        return (1 + again) * (1 + _OVERHEAD_TOKENS / self.tokens)

    def sentence(self) -> str:
        """The plan in words."""
        counts, layers = Counter(self.recompute), len(self.recompute)
        given_up = [f"{counts[level]} of {layers} layers {words}" for level, words in _WORDS.items() if counts[level]]
        what = ", ".join(given_up) or "nothing is computed twice"
        bound = "" if self.budget is None else f" of {self.budget / 1e9:.1f} GB"
        return f"memory: about {self.total / 1e9:.2f} GB{bound}; {self.micro_batch} rows at a time; {what}"


def make_memory_plan(
    fixed: Fixed, activations: Activations, tokens: Mapping[int, int], budget: int | None, *, smallest: bool = False
) -> MemoryPlan:
    """The fastest plan within `budget` (None: no bound); the smallest of all if none fits or `smallest` asks for it.

    Args:
        tokens: micro-batches to choose from, each with the tokens of its largest one.
    """
    plans = [
        _plan(fixed, activations, micro_batch, count, recompute, budget)
        for micro_batch, count in tokens.items()
        for recompute in _choices(list(activations.saved), activations.layers)
    ]
    fitting = [plan for plan in plans if plan.fits]
    if smallest or not fitting:
        return min(plans, key=lambda plan: (plan.total, plan.time))
    return min(fitting, key=lambda plan: (plan.time, plan.total))


def _plan(
    fixed: Fixed,
    activations: Activations,
    micro_batch: int,
    tokens: int,
    recompute: tuple[Recompute, ...],
    budget: int | None,
) -> MemoryPlan:
    in_backward = activations.heap * tokens * activations.transient_of(recompute)
    return MemoryPlan(
        micro_batch=micro_batch,
        tokens=tokens,
        recompute=recompute,
        fixed=fixed,
        saved=round(activations.heap * tokens * activations.saved_by(recompute)),
        transient=round(max(activations.logits, in_backward) + activations.scratch),
        budget=budget,
    )


def _choices(ladder: Sequence[Recompute], layers: int) -> Iterable[tuple[Recompute, ...]]:
    """All layers at the top of the ladder, then one after the other, the first layers first, a rung down."""
    yield (ladder[0],) * layers
    for upper, lower in pairwise(ladder):
        for count in range(1, layers + 1):
            yield (lower,) * count + (upper,) * (layers - count)
