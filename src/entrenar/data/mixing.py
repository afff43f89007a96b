"""Which rows of which source make up a set: a pure function of the seed, the sizes and the order of the entries.

The set is the same in every epoch, so a run that is resumed goes on with the very rows.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

from entrenar.core.errors import InputError
from entrenar.data.sources import Source


def row_counts(sources: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    """How many rows each source gives, of the `sizes` that they have.

    One with `rows` gives so many, one with neither gives all that it has. Those with a weight w_i above 0 and N rows
    together give N rows, N·w_i/Σw each, rounded so that the sum is N (largest remainders, the first of equals).

    Raises:
        InputError: a source has no row and gives some, or its weight is too small for one row.
    """
    counts = _shares(sources, sizes)
    for source, size, count in zip(sources, sizes, counts, strict=True):
        if count and not size:
            raise InputError(f"{source.path} leaves no row to take: check max_length and the rejected rows")
        if not count and source.weight:
            raise InputError(
                f"{source.path} gives no row with weight {source.weight:g}: raise it, or leave the entry out"
            )
    return counts


def _shares(sources: Sequence[Source], sizes: Sequence[int]) -> list[int]:
    weights = [Fraction(source.weight or 0) for source in sources]
    rows = sum(size for size, weight in zip(sizes, weights, strict=True) if weight)
    whole = sum(weights) or 1
    exact = [rows * weight / whole for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: rows - sum(counts)]:
        counts[index] += 1
    return [
        size if source.is_whole else source.rows or count
        for source, size, count in zip(sources, sizes, counts, strict=True)
    ]


def choose(size: int, count: int, seed: int, stream: str) -> list[int]:
    """`count` of the rows 0 … size−1: whole passes over all, then a part of them chosen by the seed, in their order.

    So each row comes ⌊count/size⌋ or ⌈count/size⌉ times. `stream` sets the choices of several sources apart.
    """
    if not count:
        return []
    passes, rest = divmod(count, size)
    rows = list(range(size)) * passes
    return rows + (sorted(_ranked(size, seed, stream)[:rest]) if rest else [])


def _ranked(size: int, seed: int, stream: str) -> list[int]:
    """The rows by a hash, which is the same on every machine and with every version of the libraries."""
    return sorted(range(size), key=lambda row: hashlib.sha256(f"{seed}|{stream}|{row}".encode()).digest())
