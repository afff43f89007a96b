"""What the benchmarks share: alternating timing, a peer in a process of its own, the table and the JSON.

Ours and the peer take turns in one run, so that what disturbs the machine disturbs both; the median of each counts.
A peer that is a library of its own runs in its own process: entrenar's allocator settings would otherwise speed it up.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entrenar.core.memory import PeakMemory

Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; ours and peer in `unit`, ratio > 1 where ours is better."""

    metric: str
    shape: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    limit: float


# A turn is warm calls for this long, then timed calls for as long; at least one of each. After a pause Linux may keep
# two threads on one core for some milliseconds: a turn of 5 ms then measures half a machine.
TURN = 0.02


def seconds(work: Work) -> float:
    """Median wall time of the calls of one turn, in a process that is already busy with them."""
    _calls(work)
    return statistics.median(_calls(work))


def _calls(work: Work) -> list[float]:
    found: list[float] = []
    while sum(found) < TURN:
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


# OpenMP's threads spin for some milliseconds after their work: the next turn must not run against them.
PAUSE = 0.02


def alternate(ours: Work, peer: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Median seconds of ours and of the peer, which returns its own; two turns of each first to warm up."""
    pairs = []
    for _ in range(rounds + 2):
        time.sleep(PAUSE)
        first = seconds(ours)
        time.sleep(PAUSE)
        pairs.append((first, peer()))
    pairs = pairs[2:]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def timed(work: Work) -> Callable[[], float]:
    """A peer that runs in this process."""
    return lambda: seconds(work)


def rate(metric: str, shape: str, items: float, times: tuple[float, float], peer_name: str, limit: float) -> Row:
    """A row in Gelem/s: more is better."""
    ours, peer = items / times[0] / 1e9, items / times[1] / 1e9
    return Row(
        metric=metric, shape=shape, unit="Gelem/s", ours=ours, peer=peer,
        peer_name=peer_name, ratio=ours / peer, limit=limit,
    )  # fmt: skip


def duration(metric: str, shape: str, times: tuple[float, float], peer_name: str, limit: float) -> Row:
    """A row in microseconds: less is better."""
    return Row(
        metric=metric, shape=shape, unit="us", ours=times[0] * 1e6, peer=times[1] * 1e6,
        peer_name=peer_name, ratio=times[1] / times[0], limit=limit,
    )  # fmt: skip


def leave_this_folder() -> None:
    """For a process of the peers: transformers and bitsandbytes import a package `kernels`, which is a script here."""
    sys.path[:] = [place for place in sys.path if not (Path(place) / "kernels.py").is_file()]


class PeerProcess:
    """A spawned process that prepares work by name and times it on demand.

    Args:
        prepare: a module-level function (name, *arguments) → work; it imports the peer, this process does not.
    """

    def __init__(self, prepare: Callable[..., Work]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, prepare), daemon=True)

    def __enter__(self) -> "PeerProcess":
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pipe.send(None)
        self._process.join()

    def peak_memory(self) -> "PeakMemory":
        """A context that watches the process's anonymous memory."""
        from entrenar.core.memory import PeakMemory

        return PeakMemory(process=self._process.pid)

    def prepare(self, *arguments: object) -> Callable[[], float]:
        """Have the work prepared; what comes back runs it there once and returns its seconds."""
        self._pipe.send(arguments)

        def run() -> float:
            self._pipe.send(())
            return self._pipe.recv()

        return run


def _serve(pipe: Connection, prepare: Callable[..., Work]) -> None:
    work: Work | None = None
    while (message := pipe.recv()) is not None:
        if message:
            work = prepare(*message)
        elif work is not None:
            pipe.send(seconds(work))


def report(rows: list[Row], path: str | None) -> None:
    """Print the table; with a path also write it as JSON."""
    print(f"{'metric':34} {'shape':>10} {'ours':>9} {'peer':>9} {'unit':8} {'ratio':>7} {'limit':>6}  peer")
    for row in rows:
        missed = "" if row.ratio >= row.limit else "  below the limit"
        numbers = f"{row.ours:9.4g} {row.peer:9.4g} {row.unit:8} {row.ratio:7.3g} {row.limit:6.2f}"
        print(f"{row.metric:34} {row.shape:>10} {numbers}  {row.peer_name}{missed}")
    if path:
        Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def arguments(description: str) -> argparse.Namespace:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--rounds", type=int, default=21, help="timed calls of each side")
    parser.add_argument("--only", default="", help="only metrics whose name contains this")
    return parser.parse_args()
