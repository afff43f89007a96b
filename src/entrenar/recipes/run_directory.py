"""The directory of a run: new, to be resumed, finished, or somebody else's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.core.atomic import write_text
from entrenar.core.config import load_config, to_yaml
from entrenar.core.errors import InputError, listing
from entrenar.recipes.config import RunConfig
from entrenar.training.checkpoint import latest_checkpoint

CONFIG_NAME, ADAPTER_NAME = "config.yaml", "adapter"


@dataclass(frozen=True)
class RunDirectory:
    """Where a run writes, and what is there already."""

    path: Path
    checkpoint: Path | None
    is_finished: bool

    @property
    def adapter(self) -> Path:
        """The adapter that the run leaves."""
        return self.path / ADAPTER_NAME

    def start(self, config: RunConfig) -> None:
        """Make the directory and write the resolved config, once everything else has been found in order."""
        write_text(self.path / CONFIG_NAME, to_yaml(config))


def open_run_directory(config: RunConfig) -> RunDirectory:
    """Look at the output directory without writing.

    Raises:
        InputError: it holds something else, or a run with another config (the keys that differ are named).
    """
    path = Path(config.output)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return RunDirectory(path, None, is_finished=False)
    if not (path / CONFIG_NAME).is_file():
        raise InputError(
            f"output {path} exists and is not a run of entrenar: choose another output; nothing was changed"
        )
    different = _differences(load_config(RunConfig, path / CONFIG_NAME), config)
    if different:
        raise InputError(
            f"output {path} holds another run, which differs in {listing(different)}: choose another output, or remove "
            "that directory; nothing was changed"
        )
    return RunDirectory(path, latest_checkpoint(path / "checkpoints"), (path / ADAPTER_NAME).is_dir())


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ, in what makes the run's numbers; printing, memory and the device do not."""
    aside: Any = {"log": True, "training": {"memory"}, "model": {"device"}}
    left, right = (_flat(config.model_dump(exclude=aside)) for config in (old, new))
    return [key for key in right if left.get(key) != right[key]]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
