"""Sequences that share their beginnings, as one trunk and branches: what is shared is computed once.

A template that writes earlier turns otherwise once later ones follow (thoughts left out, a call rendered anew) gives
each answer of a conversation another prompt. The last answer's prompt and the answer are the trunk; an earlier answer
that does not stand in it is a branch, which leaves the trunk where the two begin to differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile


@dataclass(frozen=True)
class Path:
    """What a model is given and answers: token ids, of which those from `start` on are trained."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Tree:
    """Token ids, whether each is trained, and where the branches begin: (index in `ids`, position of that token).

    A branch repeats the last token that it shares with the trunk, untrained: so each token is predicted at the one
    before it, and the positions alone tell branches from the trunk and from each other.
    """

    ids: list[int]
    trained: list[bool]
    branches: tuple[tuple[int, int], ...]


@dataclass
class _Run:
    """A path of which the first `shared` tokens are the trunk's."""

    ids: list[int]
    shared: int = 0
    trained: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trained = [False] * len(self.ids)


def as_tree(paths: Sequence[Path], rest: Sequence[int] = ()) -> Tree:
    """The paths of a conversation's answers, in order, as one tree; the last is the trunk, `rest` follows it untrained.

    A path that another one begins with needs no branch.
    """
    trunk, branches = _Run(paths[-1].ids), list[_Run]()
    for path in reversed(paths):
        run = next((run for run in (trunk, *branches) if run.ids[: len(path.ids)] == path.ids), None)
        if run is None:
            run = _Run(path.ids, _common(trunk.ids, path.ids))
            branches.append(run)
        for index in range(path.start, len(path.ids)):
            (trunk if index < run.shared else run).trained[index] = True
    ids, trained = [*trunk.ids, *rest], [*trunk.trained, *([False] * len(rest))]
    starts = list[tuple[int, int]]()
    # From the one that leaves last: so none begins at the position after the one before it, which would continue it.
    for run in sorted(branches, key=lambda run: -run.shared):
        first = max(run.shared - 1, 0)
        starts.append((len(ids), first))
        ids += run.ids[first:]
        trained += run.trained[first:]
    return Tree(ids, trained, tuple(starts))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
