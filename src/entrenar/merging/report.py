"""What a merge did, in numbers: the result's distance from every parent, by kind of layer; what came to nothing.

With a base the numbers are of task vectors (x − base), else of the weights. They are taken from a sample: the first
16,384 elements of every million of each tensor.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from entrenar.merging.plan import MergePlan


@dataclass(frozen=True)
class ParentRow:
    """The result against one parent: cosine, and its norm over the parent's; None where a norm is 0."""

    parent: str
    cosine: float | None
    norm_ratio: float | None


@dataclass(frozen=True)
class KindRow:
    """All tensors of one kind (a name without its layer's number)."""

    kind: str
    tensors: int
    parameters: int
    parents: list[ParentRow]


@dataclass(frozen=True)
class MergeReport:
    """The whole result; `remarks` are sentences about what came to nothing."""

    of: str
    kinds: list[KindRow]
    remarks: list[str]

    def as_json(self) -> dict[str, Any]:
        """For merge-report.json."""
        return asdict(self)


def make_report(plan: MergePlan, notes: dict[str, Any]) -> MergeReport:
    """From the statistics of every tensor (merging/execute.py's `_Watch`)."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    planned = {tensor.name: tensor for tensor in plan.tensors}
    for tensor in plan.tensors:
        groups.setdefault((tensor.kind, tuple(tensor.labels)), []).append(tensor.name)
    kinds = []
    for (kind, labels), names in groups.items():
        gram = torch.tensor([notes[name] for name in names], dtype=torch.float64).sum(0)
        size = sum(planned[name].numel for name in names)
        parents = [_against(plan.shown[label], gram, index) for index, label in enumerate(labels)]
        kinds.append(KindRow(kind, len(names), size, parents))
    of = "task vectors" if any(tensor.base for tensor in plan.tensors) else "weights"
    return MergeReport(of, kinds, _remarks(plan, notes))


def _against(label: str, gram: torch.Tensor, index: int) -> ParentRow:
    mine, theirs = math.sqrt(max(float(gram[-1, -1]), 0)), math.sqrt(max(float(gram[index, index]), 0))
    cosine = float(gram[-1, index]) / (mine * theirs) if mine and theirs else None
    return ParentRow(label, None if cosine is None else max(-1.0, min(1.0, cosine)), mine / theirs if theirs else None)


def _remarks(plan: MergePlan, notes: dict[str, Any]) -> list[str]:
    remarks = list(plan.remarks)
    base = next((tensor.base for tensor in plan.tensors if tensor.base), None)
    labels = list(dict.fromkeys(label for tensor in plan.tensors for label in tensor.labels))
    for label in labels:
        pairs = [
            (torch.tensor(notes[tensor.name]), tensor.labels.index(label))
            for tensor in plan.tensors
            if label in tensor.labels
        ]
        if base is not None and all(float(gram[index, index]) == 0 for gram, index in pairs):
            remarks.append(f"{plan.shown[label]} is equal to the base: it adds nothing")
        if plan.origins != list(range(plan.models[label].layers)):
            continue  # other layers, or in another order: nobody's equal
        if len(pairs) == len(plan.tensors) and all(_is_equal(gram, index) for gram, index in pairs):
            remarks.append(f"the result is equal to {plan.shown[label]}: nothing was merged")
    is_whole = plan.origins == list(range(plan.reference.layers))
    if base is not None and is_whole and all(float(torch.tensor(note)[-1, -1]) == 0 for note in notes.values()):
        remarks.append("the result is equal to the base: nothing was merged")
    return remarks


def _is_equal(gram: torch.Tensor, index: int) -> bool:
    distance = float(gram[-1, -1] - 2 * gram[-1, index] + gram[index, index])
    return abs(distance) <= 1e-12 * float(gram[index, index])
