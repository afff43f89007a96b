"""The seam between a way to train and everything that runs one: the loop, evaluation, the memory plan and `check`.

A new objective is a class here and a row in registry.py; what it needs of its rows comes encoded in `PreparedData`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.data.batches import Batch, collate, micro_batches
from entrenar.data.encode import Example


class Loss(NamedTuple):
    """Of one micro-batch: `total` () float64, summed over what the objective counts, and named figures, summed too."""

    total: Tensor
    figures: Mapping[str, float] = MappingProxyType({})


class Objective(ABC):
    """Rows → sequences → micro-batches → a loss.

    The loss of a global batch is Σ total / Σ count over its micro-batches, so that how a batch is split changes no
    gradient; that is why the count of a batch is known before its loss is computed.
    """

    def sequences(self, row: Example) -> Sequence[Example]:
        """The token sequences that one row of the data becomes: more than one where answers are compared."""
        return (row,)

    def batches(self, rows: Sequence[Example], micro_batch: int, pad_id: int, pack_to: int) -> list[Batch]:
        """Split rows into micro-batches; see `data.batches.micro_batches`."""
        return micro_batches([one for row in rows for one in self.sequences(row)], micro_batch, pad_id, pack_to)

    def trial(self, ids: Sequence[int]) -> Batch:
        """A batch of one row of these tokens, every one a target: what the memory plan runs to see what is saved."""
        return collate([[Example(0, list(ids), [True] * len(ids))]], pad_id=0)

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """What the loss of a batch is divided by: target tokens, or pairs."""

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        """The summed loss of a micro-batch, with a gradient where gradients are enabled."""


@torch.no_grad()
def mean_loss(objective: Objective, model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[float, int]:
    """Mean loss over batches, and the count that it is over."""
    total = sum(objective.loss(model, batch).total.item() for batch in batches)
    count = sum(map(objective.count, batches))
    return total / count, count
