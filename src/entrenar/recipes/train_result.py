"""What a finished run left: `result.json`, or what its log tells where that is missing."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

from entrenar.core.atomic import remove_tree, write_text
from entrenar.core.documents import parse_json, read_json
from entrenar.core.errors import InputError
from entrenar.core.run_log import read_metrics
from entrenar.recipes.run_directory import METRICS_NAME, RunDirectory

RESULT_NAME = "result.json"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run left; losses in nats per target token; seconds of all its sessions that left a checkpoint or
    ended it; memory: peak bytes where it ran in the last of them, as measured and as planned.
    """

    run_dir: str
    adapter: str
    steps: int
    tokens: int
    train_loss: float | None
    eval_loss: float | None
    seconds: float
    sessions: int
    peak_memory_bytes: int
    planned_memory_bytes: int
    resumed_from_step: int


def result_of_finished(directory: RunDirectory, say: Callable[[str], None]) -> TrainResult:
    """What `result.json` says, or else the log."""
    path = directory.path / RESULT_NAME
    here = {"run_dir": str(directory.path), "adapter": str(directory.adapter)}
    try:
        return replace(read_json(path, "result", TrainResult), **here)
    except InputError as error:
        result = _result_of_log(directory, here)
        say(f"{error}; it was made again from {METRICS_NAME}, without times and memory")
    remove_tree(path)
    write_result(directory, result)
    return result


def write_result(directory: RunDirectory, result: TrainResult) -> None:
    """Write `result.json`."""
    write_text(directory.path / RESULT_NAME, json.dumps(asdict(result), indent=2) + "\n")


def _result_of_log(directory: RunDirectory, here: Mapping[str, str]) -> TrainResult:
    try:
        rows = [parse_json(json.dumps(row), str(directory.metrics), _Logged) for row in read_metrics(directory.metrics)]
        steps = [row for row in rows if row.loss is not None and row.tokens is not None]
        last, losses = steps[-1], [row.eval_loss for row in steps if isinstance(row.eval_loss, float)]
    except (InputError, IndexError):
        raise InputError(
            f"{directory.adapter} is a finished run's adapter, but neither {RESULT_NAME} nor {METRICS_NAME} beside it "
            "can be read: use the adapter as it is, or choose another output"
        ) from None
    eval_loss = None if not losses else min(losses) if directory.config.eval.patience else losses[-1]
    return TrainResult(
        **here, steps=last.step, tokens=last.tokens or 0, eval_loss=eval_loss, seconds=0.0,
        train_loss=last.loss if isinstance(last.loss, float) else None,
        sessions=0, peak_memory_bytes=0, planned_memory_bytes=0, resumed_from_step=0,
    )  # fmt: skip


@dataclass(frozen=True)
class _Logged:
    step: int
    loss: float | str | None = None
    tokens: int | None = None
    eval_loss: float | str | None = None


def finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
