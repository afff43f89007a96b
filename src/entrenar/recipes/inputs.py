"""Paths and names that a user typed, checked in milliseconds: nothing here imports torch or opens a model.

What is found here is found again by whoever reads the file; this only says it before seconds of imports are spent.
"""

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrenar.core.documents import open_regular
from entrenar.core.errors import InputError

# How `quantize` names a base: formats, its own precision, a file's own blocks (opening/load.py).
QUANTIZE = ("nf4", "fp4", "int4", "int8", "none", "keep")
_PATTERN = "*?["
_HUB_ID = re.compile(r"(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def check_model(path: str) -> None:
    """InputError for a path of a model that is not there; a hub id passes."""
    if path.endswith(".gguf"):
        open_regular(Path(path), "GGUF file").close()
        return
    if not _HUB_ID.fullmatch(path) and not _exists(path):
        raise InputError(f"model path {path!r} does not exist: point to a model directory, a .gguf file or a hub id")


def check_adapter(path: str | None) -> None:
    """InputError for an adapter that is not there; None passes."""
    if path is not None and not _exists(path):
        raise InputError(f"adapter {path} does not exist: point to a PEFT adapter directory (adapter_config.json)")


def check_file(path: str | Path | None, what: str) -> None:
    """InputError for a file that is not there; `what` names it: "data file". None and patterns (`*.jsonl`) pass."""
    if path is not None and not _exists(str(path)) and not any(char in str(path) for char in _PATTERN):
        raise InputError(f"{what} {path} does not exist: check the path")


def check_data(path: str) -> None:
    """InputError for a data file that is not there; a hub id of a dataset passes."""
    from entrenar.data.sources import is_hub_id

    if not is_hub_id(path):
        check_file(path, "data file")


def check_inspected(path: str | Path) -> None:
    """InputError for nothing to look into."""
    if not _exists(str(path)):
        raise InputError(
            f"{path} does not exist: point to a .gguf or .safetensors file, a model or an adapter directory"
        )
    if not Path(path).is_dir():
        open_regular(Path(path), "file").close()  # a named pipe would be waited at for ever


def check_quantize(name: str | None) -> None:
    """InputError for a base format that is not known."""
    if name is not None and name not in QUANTIZE:
        raise InputError(f"there is no base format {name!r}: choose {', '.join(QUANTIZE)}")


def check_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
    """InputError for a run's config, or a model or data file that it names, that is not there; the rest is read later.

    Of the values only plain paths are looked at, so that whatever else is wrong is told by the config's own reader.
    """
    from entrenar.core.config import load_values

    values = load_values(Path(path), overrides)
    model, data = (_section(values, name) for name in ("model", "data"))
    if isinstance(model.get("path"), str):
        check_model(model["path"])
    for key in ("train", "validation"):
        entries = data.get(key)
        for entry in entries if isinstance(entries, list) else [entries]:
            named = entry.get("path") if isinstance(entry, Mapping) else entry
            if isinstance(named, str):
                check_data(named)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _exists(path: str) -> bool:
    """Whether something is there; what may not be looked at is told by whoever opens it."""
    try:
        return Path(path).exists() if path else False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    except ValueError:
        return False
