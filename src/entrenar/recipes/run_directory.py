"""The directory of a run: new, to be resumed, finished, or somebody else's.

One rename ends a run: that of `adapter/`. `result.json` is written before it and says nothing until it has happened; a
run whose adapter is there is finished, and should its result be missing all the same it is made again from the log.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrenar.core.atomic import disk_errors, output_lock, remove_tree, write_text
from entrenar.core.config import load_config, to_yaml
from entrenar.core.documents import reason
from entrenar.core.errors import EntrenarError, InputError, listing
from entrenar.recipes.config import RunConfig
from entrenar.training.checkpoint import latest_checkpoint

CONFIG_NAME, ADAPTER_NAME, METRICS_NAME = "config.yaml", "adapter", "metrics.jsonl"
# What a run that was killed, or has been started beside this one, may have in a directory that holds nothing else yet.
_BEGUN = re.compile(rf"\.{re.escape(CONFIG_NAME)}\.(tmp-.*|lock)")
_TEMPORARY = re.compile(
    r"\.(config\.yaml|(metrics|rejected)\.jsonl|result\.json|adapter|(step|best)-[0-9]+)\.tmp-[^.]+"
)
# What the first start fixes, by its value in a config that leaves it open.
_OPEN = {("data", "date"): None, ("model", "dtype"): "auto"}


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes, and what is there already; `config` with what an earlier start fixed."""

    path: Path
    config: RunConfig
    checkpoint: Path | None = None
    is_finished: bool = False

    @property
    def adapter(self) -> Path:
        """The adapter that the run leaves."""
        return self.path / ADAPTER_NAME

    @property
    def checkpoints(self) -> Path:
        """What the run goes on from, and its best."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The log."""
        return self.path / METRICS_NAME

    def start(self) -> None:
        """Make the directory and write the resolved config, once everything else has been found in order."""
        write_text(self.path / CONFIG_NAME, to_yaml(self.config))

    def fixing(self, section: str, **values: Any) -> "RunDirectory":
        """The same with values in its config that the run will keep."""
        changed = getattr(self.config, section).model_copy(update=values)
        return replace(self, config=self.config.model_copy(update={section: changed}))


@contextmanager
def locked(config: RunConfig) -> Iterator[None]:
    """Hold a run's directory against other processes, from the first look at it on; and tell in one sentence what the
    system says against reading or writing anything while it is held.

    Raises:
        InputError: another process holds it, or nothing can be written there. EntrenarError: a disk that failed.
    """
    path = output_path(config)
    # Where nothing can be made beside it (a mounted directory), the lock lies in it.
    inside = path.is_dir() and not os.access(path.parent, os.W_OK)
    with output_lock(path / CONFIG_NAME if inside else path), _system_errors(path):
        yield


def output_path(config: RunConfig) -> Path:
    """The directory that a config names; InputError where it can be none."""
    path = Path(config.output)
    try:
        path = path if path.name not in ("", "..") else path.resolve()
        status = path.stat() if path.name else None
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError) as error:
        raise InputError(f"output {config.output!r} cannot be used: {reason(error)}; choose another output") from None
    if status is None:
        raise InputError(f"output {config.output!r} is the root of everything: choose another output")
    return path


def open_run_directory(config: RunConfig) -> RunDirectory:
    """Look at the output directory without writing.

    Raises:
        InputError: it holds something else, or a run with another config (the keys that differ are named).
    """
    path = output_path(config)
    if _is_free(path):
        return RunDirectory(path, config)
    if not (path / CONFIG_NAME).is_file():
        raise InputError(
            f"output {path} exists and is not a run of entrenar: choose another output; nothing was changed"
        )
    old = load_config(RunConfig, path / CONFIG_NAME)
    directory = _with_fixed(RunDirectory(path, config), old)
    different = _differences(old, directory.config)
    if different:
        raise InputError(
            f"output {path} holds another run, which differs in {listing(different)}: choose another output, or remove "
            "that directory; nothing was changed"
        )
    if os.path.lexists(directory.adapter) and not directory.adapter.is_dir():
        raise InputError(f"{directory.adapter} is no directory: remove it, the run's adapter goes there")
    checkpoint = latest_checkpoint(directory.checkpoints, with_best=bool(config.eval.patience))
    return replace(directory, checkpoint=checkpoint, is_finished=directory.adapter.is_dir())


def _is_free(path: Path) -> bool:
    """Whether there is nothing yet, or only what a start leaves before anything else."""
    if not os.path.lexists(path):
        return True
    if not path.is_dir():
        return False
    try:
        return all(_BEGUN.fullmatch(entry.name) for entry in path.iterdir())
    except OSError as error:
        raise InputError(f"output {path} cannot be read: {reason(error)}; choose another output") from None


def _with_fixed(directory: RunDirectory, old: RunConfig) -> RunDirectory:
    """What the config leaves open is as the run's first start resolved it."""
    for (section, key), unset in _OPEN.items():
        if getattr(getattr(directory.config, section), key) == unset:
            directory = directory.fixing(section, **{key: getattr(getattr(old, section), key)})
    return directory


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ, in what makes the run's numbers: not its place, printing, memory or device."""
    aside: Any = {"output": True, "log": True, "training": {"memory"}, "model": {"device"}}
    left, right = (_flat(config.model_dump(exclude=aside)) for config in (old, new))
    return [key for key in right if left.get(key) != right[key]]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """A full disk, a file that may not be read, one that is no file: the system's word for it, and which file."""
    try:
        with disk_errors(path):
            yield
    except EntrenarError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise EntrenarError(
            f"the run in {path} cannot go on: {where}{reason(error)}; when that is mended, the same command goes on "
            "from the newest checkpoint"
        ) from error


def sweep(directory: RunDirectory) -> None:
    """Remove what killed processes left of the run's files under temporary names."""
    for folder in (directory.path, directory.checkpoints):
        for left in folder.glob(".*.tmp-*"):
            if _TEMPORARY.fullmatch(left.name):
                remove_tree(left)
