"""Faults where a run writes: the process is killed there, or the disk is full from there on.

Points are counted by Python's audit events (open for writing, rename, mkdir, remove, rmdir) below one directory, by
fsync, and inside the writes themselves, of which half reaches the file. A run is made in a forked child, so that it can
die; the parent's imports are not paid for again.
"""

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch

from entrenar.core.errors import EntrenarError
from entrenar.core.run_log import MetricsLog, read_metrics
from entrenar.files.peft import WEIGHTS_NAME
from entrenar.recipes.train import train

KILL, FULL = "kill", "full"
NUMBERS = ("step", "loss", "lr", "grad_norm", "tokens", "eval_loss", "batch", "skipped")
_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_TAKE_SPACE = {"open", "os.mkdir", "write", "fsync"}


@dataclass
class Ending:
    """How a child ended: `result`, an error's `sentence` and exit code, a `traceback`, or killed; points it passed."""

    points: list[str]
    result: dict[str, Any] | None = None
    sentence: str = ""
    exit_code: int | None = None
    traceback: str = ""


class Faults:
    """Counts points below a directory and lets the `at`-th (from 0; None: no one) end the process or fail."""

    def __init__(self, below: Path, kind: str = KILL, at: int | None = None) -> None:
        self.points: list[str] = []
        self._below, self._kind, self._at = str(below), kind, at

    def install(self) -> None:
        """Watch this process; it cannot be undone, so it is for a child."""
        sys.addaudithook(self._audit)
        sync = os.fsync
        os.fsync = lambda descriptor: (self._point("fsync", f"/proc/self/fd/{descriptor}"), sync(descriptor))[1]
        self._cut(
            Path, "write_text", lambda path, text, **options: path.open("w", **options).write(text[: len(text) // 2])
        )
        self._cut(MetricsLog, "write", lambda log, row: log._file.write(json.dumps(row).encode()[:20]))
        self._cut(
            safetensors.torch,
            "serialize_file",
            lambda tensors, path, **_: Path(path).write_bytes(b"half of a file"),
        )

    def _cut(self, owner: Any, name: str, half: Callable[..., object]) -> None:
        whole = getattr(owner, name)

        def write(*arguments: Any, **options: Any) -> Any:
            self._point("write", name, lambda: half(*arguments, **options))
            return whole(*arguments, **options)

        setattr(owner, name, write)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not str(arguments[0]).startswith(self._below):
            return
        if event == "open" and not int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self._point(event, str(arguments[0]))

    def _point(self, event: str, where: str, first: Callable[[], object] = lambda: None) -> None:
        number = len(self.points)
        self.points.append(f"{event} {Path(where).name}")
        if self._at is None or number < self._at:
            return
        if self._kind == KILL:
            self._at = None
            first()
            os.kill(os.getpid(), signal.SIGKILL)
        if event in _TAKE_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where)


def run(config: Path, below: Path, kind: str = KILL, at: int | None = None) -> Ending | None:
    """`train(config)` in a child with faults; None if it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _run_and_exit(config, Faults(below, kind, at), writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        told = stream.read()
    os.waitpid(child, 0)
    return Ending(**json.loads(told)) if told else None


def _run_and_exit(config: Path, faults: Faults, writer: int) -> NoReturn:
    ending = Ending(faults.points)
    try:
        faults.install()
        ending.result = vars(train(config))
    except EntrenarError as error:
        ending.sentence, ending.exit_code = str(error), error.exit_code
    except BaseException:
        ending.traceback = traceback.format_exc()
    finally:
        with os.fdopen(writer, "wb") as stream:
            stream.write(json.dumps(vars(ending)).encode())
        os._exit(0)


def outcome(run_dir: Path) -> tuple[Any, ...]:
    """What two runs that are equal have in common: adapter, log, result and names, times and memory left out."""
    rows = [{key: row[key] for key in NUMBERS if key in row} for row in read_metrics(run_dir / "metrics.jsonl")]
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    told = {key: result[key] for key in ("steps", "tokens", "train_loss", "eval_loss")}
    names = sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))
    return (run_dir / "adapter" / WEIGHTS_NAME).read_bytes(), rows, told, names
