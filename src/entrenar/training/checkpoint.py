"""Checkpoints of a run: adapter, optimiser state and counters as safetensors and JSON, never pickle.

`checkpoints/step-N/` (to resume from) and `best-N/` (lowest validation loss) appear complete or not at all: each is
filled under a temporary name, then renamed. `manifest.json` holds a SHA-256 of every file; resume takes the newest
`step-N` that agrees with its manifest.
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entrenar.core.atomic import atomic_directory
from entrenar.core.errors import InputError
from entrenar.files.peft import WEIGHTS_NAME, read_tensors, write_tensors
from entrenar.lora.tensors import adapter_tensors, set_tensors
from entrenar.training.state import State

STEP, BEST = "step", "best"
_OPTIMIZER, _STATE, _MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"


def save_checkpoint(
    directory: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: State
) -> None:
    """Write `directory/name`; one of that name, left by a run that was killed and is now repeated, is replaced."""
    target = directory / name
    if target.exists():
        shutil.rmtree(target)
    with atomic_directory(target) as temporary:
        write_tensors(temporary / WEIGHTS_NAME, adapter_tensors(model))
        save_file(_optimizer_tensors(model, optimizer), temporary / _OPTIMIZER)
        (temporary / _STATE).write_text(json.dumps(dataclasses.asdict(state), indent=2), encoding="utf-8")
        manifest = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def drop_older(directory: Path, prefix: str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints called `<prefix>-N`."""
    for old in _by_step(directory, prefix)[keep:]:
        shutil.rmtree(old)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest `step-*` that agrees with its manifest, or None."""
    return next((path for path in _by_step(directory, STEP) if _is_valid(path)), None)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str) -> State:
    """Put adapter and optimiser back as they were and return the counters.

    Raises:
        InputError: the data is not what the checkpoint was trained on, or it adapts other layers.
    """
    state = State(**json.loads((path / _STATE).read_text(encoding="utf-8")))
    if state.fingerprint != fingerprint:
        raise InputError(f"{path} was trained on other data (rows, template or lengths changed): choose another output")
    set_tensors(dict(model.named_modules()), read_tensors(path / WEIGHTS_NAME), str(path))
    _set_optimizer(model, optimizer, load_file(path / _OPTIMIZER))
    return state


def load_factors(path: Path, model: nn.Module) -> None:
    """Put only the adapter of a checkpoint back."""
    set_tensors(dict(model.named_modules()), read_tensors(path / WEIGHTS_NAME), str(path))


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter>|<state>` → tensor."""
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _set_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        owner, _, key = name.rpartition("|")
        parameter = parameters[owner]
        optimizer.state[parameter][key] = value.to(parameter.device)


def _by_step(directory: Path, prefix: str) -> list[Path]:
    """`<prefix>-N`, newest first."""
    numbers = {path: path.name.removeprefix(f"{prefix}-") for path in directory.glob(f"{prefix}-*")}
    found = [path for path, number in numbers.items() if number.isdigit()]
    return sorted(found, key=lambda path: int(numbers[path]), reverse=True)


def _is_valid(path: Path) -> bool:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        return all(_sha256(path / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
