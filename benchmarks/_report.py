"""What the benchmark scripts share: time ours and the peer in turn, print a table, write the JSON rows."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison; `ratio`: how many times better than the peer; `limit`: the least that is promised, or None."""

    metric: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    limit: float | None


def alternate(ours: Callable[[], object], peer: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median seconds of both, run in turn so that a drift of the machine meets both; one run of each to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for function, spent in zip((ours, peer), times, strict=True):
            start = time.perf_counter()
            function()
            if number:
                spent.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def report(rows: Sequence[Row]) -> None:
    """Print the rows as a table; with `--json FILE` write them too."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"{'metric':<34}{'ours':>12}{'peer':>12}  {'unit':<10}{'ratio':>8}{'limit':>8}  peer")
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:g}"
        print(
            f"{row.metric:<34}{row.ours:>12.4g}{row.peer:>12.4g}  {row.unit:<10}{row.ratio:>8.2f}{limit:>8}  "
            f"{row.peer_name}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
