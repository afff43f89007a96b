"""Encode many rows on all cores: the same examples in the same order as one after the other.

Processes are forked, so that rows and tokenizer need not be sent; each gets a rendering process of its own
(data/template.py). Where a system has no safe fork, and for few rows, this process does it alone.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from entrenar.core.errors import EntrenarError, InputError
from entrenar.data.encode import Example, encode
from entrenar.data.row_options import TrainOn
from entrenar.data.rows import Row
from entrenar.data.template import ChatTemplate

# A process takes some 50 ms to start, and a row a millisecond or two.
_FEWEST, _CHUNK = 512, 64
_Result = Example | InputError


def encode_all(
    rows: Sequence[Row], template: ChatTemplate, train_on: TrainOn = "all", processes: int | None = None
) -> Iterator[_Result]:
    """Of every row its example, or why there is none. `processes`: None: as many as there are cores for the rows."""
    if processes is None:
        processes = min(len(os.sched_getaffinity(0)), len(rows) // _FEWEST) if sys.platform == "linux" else 1
    if processes <= 1:
        yield from (_encoded(row, template, train_on) for row in rows)
        return
    starts = range(0, len(rows), _CHUNK)
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), _begin, (_Job(rows, template, train_on),)
    )
    try:
        for results, reads_clock in pool.map(_encode_chunk, starts):
            template.reads_clock |= reads_clock
            yield from results
    except BrokenProcessPool:
        raise EntrenarError("a process that encodes rows was ended from outside (is there memory for it?)") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Job:
    """What a forked process finds when it begins."""

    rows: Sequence[Row]
    template: ChatTemplate
    train_on: TrainOn


_JOBS: list[_Job] = []


def _begin(job: _Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not forked, and every core has a process
    _JOBS[:] = [job]


def _encode_chunk(start: int) -> tuple[list[_Result], bool]:
    job = _JOBS[0]
    results = [_encoded(row, job.template, job.train_on) for row in job.rows[start : start + _CHUNK]]
    return results, job.template.reads_clock


def _encoded(row: Row, template: ChatTemplate, train_on: TrainOn) -> _Result:
    try:
        return encode(row, template.tokenizer, template, train_on)
    except InputError as error:
        return error
