"""Whether a model's faster forwards agreed with its class's own, kept from one process to the next, by content.

A verdict holds for a configuration, weights, dtype, machine and code: anything else is another key. It is a small file
under the user's cache directory ($XDG_CACHE_HOME, else ~/.cache); where that cannot be written nothing is kept.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from entrenar import native
from entrenar.core.atomic import write_text
from entrenar.core.documents import read_json
from entrenar.core.errors import InputError

_WHOLE, _PIECE = 1 << 14, 1 << 10  # bytes: a tensor up to so large counts whole, of others three pieces
_PACKAGES = ("torch", "transformers", "entrenar", "triton")
_ROOMS = ("models", "layers", "native", "ops", "quant")  # whose code decides what forwards compute


@dataclass(frozen=True)
class _Verdict:
    agrees: bool


def identity(model: PreTrainedModel, replaced: Iterable[str], ids: Tensor) -> str:
    """A digest of all that a verdict depends on.

    Args:
        replaced: the modules with a forward of ours. ids: the tokens that are tried.
    """
    config = model.config.to_dict()
    config.pop("_name_or_path", None)
    digest = hashlib.sha256()
    settings = sorted(config.items(), key=lambda item: str(item[0]))
    for part in (type(model).__qualname__, settings, *replaced, ids.tolist()):
        digest.update(f"{part}\n".encode())
    digest.update(f"{model.dtype} {_machine(model.device)} {_code()}".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for piece in _pieces(tensor.detach()):
            digest.update(piece)
    return digest.hexdigest()


def remembered(key: str) -> bool | None:
    """The verdict that is kept under a key; None if there is none that can be read."""
    path = _place(key)
    with suppress(InputError, OSError):
        if path is not None and path.is_file():
            return read_json(path, "a verdict on faster forwards", _Verdict).agrees
    return None


def remember(key: str, agrees: bool) -> None:
    """Keep a verdict, if there is a place for it."""
    path = _place(key)
    with suppress(InputError, OSError):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, f'{{"agrees": {"true" if agrees else "false"}}}\n')


def _place(key: str) -> Path | None:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError):  # nobody's home
        cached = given if given.is_absolute() else Path.home() / ".cache"
        return cached / "entrenar" / "forwards" / f"{key}.json"
    return None


def _pieces(tensor: Tensor) -> Iterator[bytes]:
    flat = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
    size = len(flat)
    starts = [0] if size <= _WHOLE else [0, (size - _PIECE) // 2, size - _PIECE]
    for start in starts:
        yield flat[start : start + (_WHOLE if size <= _WHOLE else _PIECE)].cpu().numpy().tobytes()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    return f"{device.type} {native.path()} {torch.backends.cpu.get_cpu_capability()}"


@cache
def _code() -> str:
    """Versions, and a digest of our own code and library: a checkout's version says little."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for room in _ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    library = native.file()
    if library is not None:
        digest.update(library.read_bytes())
    versions = []
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return f"{sys.version_info[:2]} {versions} {digest.hexdigest()}"
