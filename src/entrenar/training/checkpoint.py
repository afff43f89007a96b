"""Checkpoints of a run: adapter, optimiser state and counters as safetensors and JSON, never pickle.

`checkpoints/step-N/` (to resume from) and `best-N/` (lowest validation loss) appear complete or not at all: each is
filled under a temporary name, then renamed. `manifest.json` holds a SHA-256 of every file; resume takes the newest
`step-N` that agrees with its manifest, and whose best adapter is there if the run will want it back.
"""

import dataclasses
import hashlib
import json
import os
import re
import secrets
from io import BufferedReader
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entrenar.core.atomic import atomic_directory, disk_errors, remove_tree
from entrenar.core.documents import open_regular, read_json
from entrenar.core.errors import InputError, listing
from entrenar.files.peft import WEIGHTS_NAME, read_tensors, write_tensors
from entrenar.lora.tensors import adapter_tensors, set_tensors
from entrenar.training.state import State

STEP, BEST = "step", "best"
_OPTIMIZER, _STATE, _MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"
_FILES = {WEIGHTS_NAME, _OPTIMIZER, _STATE}


def save_checkpoint(
    directory: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: State
) -> None:
    """Write `directory/name`; one of that name, left by a run that was killed and is now repeated, is replaced."""
    target = directory / name
    if os.path.lexists(target):
        _drop(target)
    with atomic_directory(target) as temporary:
        write_tensors(temporary / WEIGHTS_NAME, adapter_tensors(model))
        save_file(_optimizer_tensors(model, optimizer), temporary / _OPTIMIZER)
        (temporary / _STATE).write_text(json.dumps(dataclasses.asdict(state), indent=2), encoding="utf-8")
        manifest = {file: _sha256(temporary / file) for file in sorted(_FILES)}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def drop_older(directory: Path, prefix: str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints called `<prefix>-N`."""
    for old in _by_step(directory, prefix)[keep:]:
        _drop(old)


def drop_unneeded_best(directory: Path, best_step: int) -> None:
    """Remove every `best-N` but that of `best_step` and those that a run resumed from one of the `step-N` would put
    back."""
    needed = {best_step}
    for path in _by_step(directory, STEP):
        try:
            needed.add(read_state(path).best_step)
        except InputError:  # nobody will resume from it
            continue
    for path in _by_step(directory, BEST):
        if int(path.name.removeprefix(f"{BEST}-")) not in needed:
            _drop(path)


def _drop(path: Path) -> None:
    """Remove a checkpoint, under a temporary name: what is half removed when the process is killed is swept later."""
    gone = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with disk_errors(path):
        path.rename(gone)
        remove_tree(gone)


def latest_checkpoint(directory: Path, *, with_best: bool = False) -> Path | None:
    """The newest `step-*` that agrees with its manifest, or None.

    Args:
        with_best: the run puts its best adapter back at its end, so that must be whole, too.
    """
    return next((path for path in _by_step(directory, STEP) if _can_resume(path, with_best)), None)


def read_state(path: Path) -> State:
    """The counters of a checkpoint; InputError when they are not what this version writes."""
    return read_json(path / _STATE, "checkpoint state", State)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str, base: str = ""
) -> State:
    """Put adapter and optimiser back as they were and return the counters.

    Raises:
        InputError: data or base weights are not what the checkpoint was trained on, or it adapts other layers.
    """
    state = read_state(path)
    if state.fingerprint != fingerprint:
        raise InputError(f"{path} was trained on other data (rows, template or lengths changed): choose another output")
    if state.base and base and state.base != base:
        raise InputError(
            f"{path} was trained over another base: the weights or config of the model have changed since; put back "
            "what was there, or choose another output"
        )
    load_factors(path, model)
    _set_optimizer(model, optimizer, _read_optimizer(path / _OPTIMIZER), path)
    return state


def load_factors(path: Path, model: nn.Module) -> None:
    """Put only the adapter of a checkpoint back; InputError if it is another model's."""
    set_tensors(dict(model.named_modules()), read_tensors(path / WEIGHTS_NAME), str(path))


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter>|<state>` → tensor."""
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _read_optimizer(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def _set_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: Path
) -> None:
    """Put tensors into the optimiser's state, whose names and shapes must be theirs. One that makes its state in its
    first step has none to compare with: then they must be of parameters that it has."""
    expected, parameters = _optimizer_tensors(model, optimizer), dict(model.named_parameters())
    if expected:
        wrong = [name for name in {**expected, **tensors} if _shape(expected, name) != _shape(tensors, name)]
    else:
        optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        owners = {name: parameters.get(name.rpartition("|")[0]) for name in tensors}
        wrong = [name for name, owner in owners.items() if id(owner) not in optimised]
    if wrong:
        raise InputError(f"{source} has another optimizer's state: {listing(wrong, 3)}; choose another output")
    for name, value in tensors.items():
        owner, _, key = name.rpartition("|")
        parameter = parameters[owner]
        optimizer.state[parameter][key] = value.to(parameter.device)


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[torch.dtype, torch.Size] | None:
    tensor = tensors.get(name)
    return None if tensor is None else (tensor.dtype, tensor.shape)


def _by_step(directory: Path, prefix: str) -> list[Path]:
    """`<prefix>-N`, newest first."""
    numbers = {path: path.name.removeprefix(f"{prefix}-") for path in directory.glob(f"{prefix}-*")}
    numbered = [path for path, number in numbers.items() if re.fullmatch("[0-9]+", number)]
    return sorted(numbered, key=lambda path: int(numbers[path]), reverse=True)


def _can_resume(path: Path, with_best: bool) -> bool:
    if not _is_valid(path):
        return False
    try:
        best = read_state(path).best_step
    except InputError:
        return False
    return not (with_best and best) or _is_valid(path.with_name(f"{BEST}-{best}"))


def _is_valid(path: Path) -> bool:
    """Whether a checkpoint holds the three files, and they are what its manifest says. Names in it are not followed."""
    try:
        manifest = read_json(path / _MANIFEST, "checkpoint manifest", dict[str, str])
        return manifest.keys() == _FILES and all(_sha256(path / name) == manifest[name] for name in _FILES)
    except (InputError, OSError):
        return False


def _sha256(file: Path) -> str:
    with open_regular(file, "checkpoint file") as stream:
        return hashlib.file_digest(cast(BufferedReader, stream), "sha256").hexdigest()
