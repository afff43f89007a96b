"""Look into a model file: tensors, types, shapes, sizes, metadata of safetensors, GGUF and adapters."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.core.errors import InputError
from entrenar.files.peft import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from entrenar.files.safetensors import SafetensorsCheckpoint, read_metadata
from entrenar.gguf.split import GGUFModel
from entrenar.recipes.inputs import check_inspected


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the listing."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a path holds: its kind, metadata and tensors."""

    kind: str
    metadata: dict[str, Any]
    tensors: list[TensorRow]

    def bits_per_weight(self) -> dict[str, float]:
        """Bits per weight of a GGUF's tensors by their place in the model, and "all"; empty for other files."""
        if not self.kind.startswith("GGUF"):
            return {}
        rows: dict[str, list[TensorRow]] = {}
        for tensor in self.tensors:
            rows.setdefault(_place(tensor.name), []).append(tensor)
        return {place: _bits(rows[place]) for place in _PLACES if place in rows} | {"all": _bits(self.tensors)}


# A tensor's place in the model, by what its name contains; the first that fits.
_PLACES = {
    "embedding": "token_embd", "norms": "_norm", "attention": "attn_", "MLP": "ffn_", "output head": "output",
    "other": "",
}  # fmt: skip


def _place(name: str) -> str:
    return next(place for place, part in _PLACES.items() if part in name)


def _bits(tensors: list[TensorRow]) -> float:
    return 8 * sum(t.bytes for t in tensors) / max(sum(math.prod(t.shape) for t in tensors), 1)


def inspect(path: str | Path) -> Inspection:
    """Read headers only.

    Raises:
        InputError: nothing there, or not a kind of file that is known.
    """
    path = Path(path)
    check_inspected(path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        return _adapter(path)
    if path.is_dir() or path.suffix == ".safetensors":
        checkpoint = SafetensorsCheckpoint(path)
        return Inspection("safetensors", checkpoint.metadata, _safetensors_rows(checkpoint))
    raise InputError(f"{path} is not a .gguf or .safetensors file, a model directory or an adapter directory")


def _gguf(path: Path) -> Inspection:
    file = GGUFModel(path)
    rows = [TensorRow(info.name, info.type.name, info.shape, info.size) for info in file.tensors.values()]
    return Inspection(f"GGUF v{file.version}", file.metadata, rows)


def _adapter(path: Path) -> Inspection:
    adapter = read_adapter(path)
    metadata = {
        "rank": adapter.rank, "alpha": adapter.alpha, "dropout": adapter.dropout,
        "base model": adapter.base_model, "layers": len(adapter.factors), **read_metadata(path / WEIGHTS_NAME),
    }  # fmt: skip
    return Inspection("PEFT LoRA adapter", metadata, _safetensors_rows(SafetensorsCheckpoint(path / WEIGHTS_NAME)))


def _safetensors_rows(checkpoint: SafetensorsCheckpoint) -> list[TensorRow]:
    return [TensorRow(name, info.dtype, info.shape, info.size) for name, info in checkpoint.tensors.items()]
