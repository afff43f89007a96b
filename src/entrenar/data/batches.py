"""Which rows make up a batch: a pure function of (seed, epoch, index); and how they become tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.data.encode import Example
from entrenar.data.packing import layout


@dataclass(frozen=True)
class Batch:
    """Rows of one or more documents, padded on the right. Letters: B rows, T tokens.

    ids (B, T) int64; positions (B, T) int64, from 0 in every document; targets (B, T) bool: the tokens whose prediction
    is trained. A document's first token is never a target: nothing predicts it. `lines`: of the documents, row by row;
    `token_count`: without padding.

    A 0 in `positions` is where a document begins, any other step than one up where a branch of it does
    (data/tree.py). Padding continues the last one, so that a row of one document is
    0 … T−1, the plain causal case that needs no mask: no real token looks ahead to padding, and none of it is a target.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    lines: tuple[int, ...]
    token_count: int

    @property
    def target_count(self) -> int:
        """Number of trained tokens."""
        return int(self.targets.sum())


def batches_per_epoch(rows: int, batch_size: int) -> int:
    """Batches of one pass over the data; the last may be smaller."""
    return math.ceil(rows / batch_size)


def batch_rows(rows: int, batch_size: int, seed: int, index: int) -> list[int]:
    """Row numbers of the `index`-th batch of a run (counted from 0 over all epochs)."""
    epoch, within = divmod(index, batches_per_epoch(rows, batch_size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(rows, generator=generator)
    return order[within * batch_size : (within + 1) * batch_size].tolist()


def collate(rows: Sequence[Sequence[Example]], pad_id: int) -> Batch:
    """Lay the documents of each row one after the other; pad rows to the longest of them."""
    totals = [sum(map(len, row)) for row in rows]
    shape = (len(rows), max(totals))
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    positions = torch.zeros(shape, dtype=torch.int64)
    targets = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = 0
        for document in row:
            end = start + len(document)
            ids[number, start:end] = torch.tensor(document.ids)
            targets[number, start:end] = torch.tensor(document.trained)
            for begin, _, first in document.runs():
                run = slice(start + begin, None)  # padding goes on from the last
                positions[number, run] = torch.arange(first, first + shape[1] - run.start)
            start = end
    targets &= positions > 0
    return Batch(ids, positions, targets, tuple(document.line for row in rows for document in row), sum(totals))


def micro_batches(examples: Sequence[Example], micro_batch: int, pad_id: int, pack_to: int = 0) -> list[Batch]:
    """Split one batch into micro-batches of `micro_batch` rows, each of as many documents as fit into `pack_to` tokens
    (0: of one)."""
    groups = layout([len(example) for example in examples], micro_batch, pack_to)
    return [collate([[examples[index] for index in row] for row in rows], pad_id) for rows in groups]
