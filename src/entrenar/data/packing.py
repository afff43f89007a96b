"""Which documents share a row: best-fit decreasing bin packing (Johnson et al. 1974, §2), and rows into micro-batches.

Packing without cutting documents, and keeping them apart in attention and positions, follows Krell et al. 2021
("Efficient Sequence Packing without Cross-contamination").
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace

# Rows are not packed beyond this, though longer documents make longer rows: little padding is left to save, while
# PyTorch's attention over a mask costs the row's length for every token (figures: docs/decisions/0008-packing.md).
ENOUGH = 512
# Documents of one row, rows of one micro-batch: indices into the lengths they were made from.
Packed = list[int]
MicroBatch = list[Packed]


def best_fit(lengths: Sequence[int], capacity: int) -> list[Packed]:
    """Put each length, longest first, into the fullest row that still has room for it; else open a row.

    A function of its arguments alone: of equal lengths the earlier goes first, of equally full rows the earlier is
    taken. A length above `capacity` gets a row of its own.
    """
    rows: list[Packed] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in _longest_first(lengths):
        place = bisect_left(room, (lengths[index], 0))
        if place < len(room):
            free, row = room.pop(place)
            rows[row].append(index)
        else:
            free, row = capacity, len(rows)
            rows.append([index])
        insort(room, (free - lengths[index], row))
    return rows


def level(lengths: Sequence[int], count: int) -> list[Packed]:
    """Put each length, longest first, into the emptiest of `count` rows: none is much longer than another."""
    rows: list[Packed] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]  # a heap of (tokens, row)
    for index in _longest_first(lengths):
        tokens, row = filled[0]
        rows[row].append(index)
        heapreplace(filled, (tokens + lengths[index], row))
    return rows


def pack(lengths: Sequence[int], capacity: int) -> list[Packed]:
    """As few rows as best fit finds, levelled where all stay within `capacity`: what remains for a half-empty last row
    would be padding there and longer attention in the others."""
    rows = best_fit(lengths, capacity)
    levelled = level(lengths, len(rows))
    return levelled if max(_total(row, lengths) for row in levelled) <= capacity else rows


def layout(lengths: Sequence[int], micro_batch: int, pack_to: int) -> list[MicroBatch]:
    """Pack documents into rows of up to `pack_to` tokens (0: one each) and take `micro_batch` rows of like length at
    a time, the longest first: the first micro-batch needs the most memory."""
    capacity = max(min(pack_to, ENOUGH), *lengths) if pack_to else 0
    rows = sorted(pack(lengths, capacity), key=lambda row: -_total(row, lengths))
    return [rows[start : start + micro_batch] for start in range(0, len(rows), micro_batch)]


def computed_tokens(micro_batches: Sequence[MicroBatch], lengths: Sequence[int]) -> int:
    """Tokens that the model computes, padding included: every row is as long as the longest beside it."""
    return sum(_computed(rows, lengths) for rows in micro_batches)


def widest(micro_batches: Sequence[MicroBatch], lengths: Sequence[int]) -> int:
    """Tokens, padding included, of the micro-batch that has most of them."""
    return max(_computed(rows, lengths) for rows in micro_batches)


def _computed(rows: MicroBatch, lengths: Sequence[int]) -> int:
    return len(rows) * max(_total(row, lengths) for row in rows)


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def _total(row: Packed, lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in row)
