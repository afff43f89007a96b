"""Which rows make up a batch: a pure function of (seed, epoch, index); and their padding into tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.data.encode import Example


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. Letters: B rows, T tokens.

    ids (B, T) int64; attention (B, T) int64, 1 for real tokens; targets (B, T) bool: the tokens whose prediction is
    trained. A row's first token is never a target: nothing predicts it.
    """

    ids: Tensor
    attention: Tensor
    targets: Tensor
    lines: tuple[int, ...]

    @property
    def target_count(self) -> int:
        """Number of trained tokens."""
        return int(self.targets.sum())

    @property
    def token_count(self) -> int:
        """Number of real tokens."""
        return int(self.attention.sum())


def batches_per_epoch(rows: int, batch_size: int) -> int:
    """Batches of one pass over the data; the last may be smaller."""
    return math.ceil(rows / batch_size)


def batch_rows(rows: int, batch_size: int, seed: int, index: int) -> list[int]:
    """Row numbers of the `index`-th batch of a run (counted from 0 over all epochs)."""
    epoch, within = divmod(index, batches_per_epoch(rows, batch_size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator)
    return order[within * batch_size : (within + 1) * batch_size].tolist()


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad rows to the longest of them."""
    length = max(len(example) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    attention = torch.zeros((len(examples), length), dtype=torch.int64)
    targets = torch.zeros((len(examples), length), dtype=torch.bool)
    for number, example in enumerate(examples):
        ids[number, : len(example)] = torch.tensor(example.ids)
        attention[number, : len(example)] = 1
        targets[number, : len(example)] = torch.tensor(example.trained)
    targets[:, 0] = False
    return Batch(ids, attention, targets, tuple(example.line for example in examples))


def micro_batches(examples: Sequence[Example], micro_batch: int, pad_id: int) -> list[Batch]:
    """Split one batch into micro-batches, rows of like length together so that little is padding."""
    ordered = sorted(examples, key=len)
    return [collate(ordered[start : start + micro_batch], pad_id) for start in range(0, len(ordered), micro_batch)]
