"""The models of a merge: a Hugging Face directory or id, or a GGUF; each perhaps with an adapter, `model+adapter`.

Weights that bitsandbytes or a GGUF holds in blocks are dequantized as they are read, piece by piece. Only headers are
read here. transformers is not needed for directories.
"""

import hashlib
import os
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrenar.core.documents import read_json, reason
from entrenar.core.errors import InputError, listing
from entrenar.files.foreign import refuse_foreign
from entrenar.files.peft import PeftAdapter, read_adapter
from entrenar.files.prequantized import PrequantizedWeight, PrequantizedWeights, open_prequantized
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stored_tensor import StoredTensor
from entrenar.lora.fusing import delta_range
from entrenar.lora.matching import check_complete, is_all_linear
from entrenar.lora.spec import config_layers, spec_of
from entrenar.merging.layers import Layers, layers_of, split_layer
from entrenar.merging.stack import Scratch, Source

_NOT_WEIGHTS = ("rotary_emb.inv_freq", "masked_bias")  # buffers that some old checkpoints carry along
_AS_THEY_ARE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WIDENED = (torch.float8_e4m3fn, torch.float8_e5m2)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class StoredSource:
    """A tensor in a file; types other than plain floats are widened as they are read."""

    stored: StoredTensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the pieces."""
        return self.stored.dtype if self.stored.dtype in _AS_THEY_ARE else torch.bfloat16

    @property
    def step(self) -> int:
        """Whole blocks of a quantized type."""
        return self.stored.step

    def raw(self, start: int, count: int, scratch: Scratch, role: Hashable) -> Tensor:
        """(count,) of the file's own type, in scratch."""
        return self.stored.read_range(start, count, scratch.take(role, self.stored.bytes_of(count)))

    def read(self, start: int, count: int, scratch: Scratch, role: Hashable) -> Tensor:
        """(count,) in scratch."""
        piece = self.raw(start, count, scratch, role)
        return piece if piece.dtype == self.dtype else piece.to(self.dtype)


@dataclass(frozen=True)
class PackedSource:
    """A weight that bitsandbytes quantized, dequantized as it is read."""

    weight: PrequantizedWeight

    @property
    def dtype(self) -> torch.dtype:
        """The product of code and scale is not rounded."""
        return torch.float32

    @property
    def step(self) -> int:
        """Any element may start a piece."""
        return 1

    def read(self, start: int, count: int, scratch: Scratch, role: Hashable) -> Tensor:  # noqa: ARG002 - Source's
        """(count,) float32."""
        return self.weight.read_range(start, count)


@dataclass(frozen=True)
class AdaptedSource:
    """A weight with its adapter laid over: W + scale · B·A, the rows of a piece at a time."""

    base: Source
    a: Tensor  # (rank, d_in) float32
    b: Tensor  # (d_out, rank) float32, times the scale

    @property
    def dtype(self) -> torch.dtype:
        """The sum is not rounded."""
        return torch.float32

    @property
    def step(self) -> int:
        """The base's."""
        return self.base.step

    def read(self, start: int, count: int, scratch: Scratch, role: Hashable) -> Tensor:
        """(count,) float32."""
        piece = self.base.read(start, count, scratch, (role, "adapted"))
        return piece.float() + delta_range(self.a, self.b, start, count)


@dataclass(frozen=True)
class InputTensor:
    """One tensor of a model: its header's words and how it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Source
    bytes: int

    @property
    def is_weight(self) -> bool:
        """Whether it is numbers to be merged; integers and truth values are buffers, which are copied."""
        return self.dtype in _AS_THEY_ARE

    @property
    def is_buffer(self) -> bool:
        """Whether it is integers or truth values."""
        return not (self.dtype.is_floating_point or self.dtype.is_complex)


@dataclass(frozen=True)
class InputModel:
    """A model as the config names it.

    Attributes:
        label: as written. directory: where config and tokenizer lie; None for a GGUF.
        config: of `config.json`. fingerprint: of the headers and sizes of its files and of samples of their data.
        left_out: tensors of its files that are no weights: transformers computes them.
    """

    label: str
    directory: Path | None
    config: dict[str, Any]
    tensors: dict[str, InputTensor]
    fingerprint: str
    left_out: tuple[str, ...] = ()

    @cached_property
    def by_layer(self) -> Layers:
        """Which tensor belongs to which layer; InputError where that cannot be."""
        return layers_of(self.label, self.tensors, self.config)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.by_layer.count

    @property
    def outside(self) -> list[str]:
        """The tensors that belong to no layer."""
        return [name for name in self.tensors if name not in self.by_layer.places]

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False))


def open_input(label: str) -> InputModel:
    """Open `path`, `hub/id`, `file.gguf`, or one of these with `+adapter`.

    Raises:
        InputError: nothing there, weights in pickles, a broken file, or an adapter that does not fit.
    """
    path, adapter = split_label(label)
    model = _open_gguf(label, path) if path.endswith(".gguf") else _open_directory(label, path)
    return model if adapter is None else _adapted(model, read_adapter(Path(adapter)), adapter)


def split_label(label: str) -> tuple[str, str | None]:
    """A model's path or id, and its adapter's if there is one."""
    if os.path.exists(label) or "+" not in label:  # noqa: PTH110 - Path's raises for a name that is too long
        return label, None
    path, _, adapter = label.rpartition("+")
    return path, adapter


def _open_directory(label: str, path: str) -> InputModel:
    directory = Path(path)
    if not os.path.isdir(path):  # noqa: PTH112 - as above
        from entrenar.opening.hub import local_directory  # imports transformers

        try:
            directory = local_directory(path)
        except InputError:
            raise
        except (OSError, ValueError) as error:  # such as a name that is too long
            raise InputError(f"model path {path[:80]!r} cannot be looked for: {reason(error)}") from None
    _refuse_pickles(directory)
    checkpoint = SafetensorsCheckpoint(directory)
    config = _read_config(directory)
    refuse_foreign(directory, config, checkpoint.tensors)
    config.pop("quantization_config", None)
    left_out = tuple(name for name in checkpoint.names() if name.endswith(_NOT_WEIGHTS))
    stored = {name: checkpoint.stored(name) for name in checkpoint.names() if name not in left_out}
    weights = open_prequantized(checkpoint)
    tensors = _tensors(stored) if weights is None else _dequantized_tensors(weights, stored)
    return InputModel(label, directory, config, tensors, _fingerprint(stored), left_out)


def _refuse_pickles(directory: Path) -> None:
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles and not any(directory.glob("*.safetensors")):
        raise InputError(
            f"{directory} has its weights in pickles ({listing(pickles, 3)}), which can run code when they are read: "
            "save the model as safetensors first (transformers: save_pretrained)"
        )


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.exists():
        raise InputError(f"{directory} has no config.json: point to a model's directory")
    config = read_json(file, "model config")
    tied = config.get("tie_word_embeddings")
    if not isinstance(tied, bool | None):
        raise InputError(f"{file}: 'tie_word_embeddings' is {str(tied)[:60]!r} but must be true or false")
    return config


def _open_gguf(label: str, path: str) -> InputModel:
    from entrenar.opening.source import open_source  # imports transformers

    source = open_source(path)
    stored = {name: source.weights.stored(name) for name in source.weights.names()}
    return InputModel(label, None, source.config.to_dict(), _tensors(stored), _fingerprint(stored))


def _tensors(stored: dict[str, StoredTensor]) -> dict[str, InputTensor]:
    return {
        name: InputTensor(tensor.shape, source.dtype if tensor.dtype in _WIDENED else tensor.dtype, source, tensor.size)
        for name, tensor in stored.items()
        for source in (StoredSource(tensor),)
    }


def _dequantized_tensors(weights: PrequantizedWeights, stored: dict[str, StoredTensor]) -> dict[str, InputTensor]:
    formats = weights.formats()
    plain = _tensors({name: stored[name] for name in weights.names() if name in stored and name not in formats})
    return plain | {
        name: InputTensor(weight.shape, weight.dtype, PackedSource(weight), weights.bytes_of(name))
        for name in formats
        for weight in (weights.weight(name),)
    }


def _adapted(model: InputModel, adapter: PeftAdapter, where: str) -> InputModel:
    if not adapter.is_plain:
        raise InputError(
            f"the adapter {where} is more than W + scale·B·A over the original weights, and a merge lays only that "
            "over: export the model with it (--to safetensors) and merge the result"
        )
    spec, tensors = spec_of(adapter), dict(model.tensors)
    grown = [n for n, weight in adapter.tensors.base.items() if n in tensors and weight.shape != tensors[n].shape]
    if grown:
        raise InputError(
            f"the adapter {where} brings another {listing(grown)} than the model's, as of a vocabulary that has grown: "
            "export the model with the adapter (--to safetensors) and merge the result"
        )
    for layer, (a, b) in adapter.factors.items():
        name = f"{layer}.weight"
        if model.is_tied and split_layer(name) is None:
            raise InputError(
                f"the adapter {where} is for {layer}, and head and embedding of the model are tied, as a merge keeps "
                "them: export the model with the adapter (--to safetensors), which unties them, and merge the result"
            )
        if name not in tensors:
            raise InputError(f"the adapter {where} is for {layer}, which {model.label} does not have")
        weight = tensors[name]
        if weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{where} has A and B of shapes {tuple(a.shape)} and {tuple(b.shape)} at {layer}, where the weight is "
                f"{weight.shape}"
            )
        source = AdaptedSource(weight.source, a.float(), b.float() * spec.for_layer(layer).scale)
        tensors[name] = InputTensor(weight.shape, weight.dtype, source, weight.bytes)
    if not is_all_linear(spec.targets):
        layers = [name.removesuffix(".weight") for name, tensor in tensors.items() if len(tensor.shape) == 2]
        check_complete(list(adapter.factors), config_layers(layers, spec), f"the adapter {where}")
    digest = hashlib.blake2b(model.fingerprint.encode(), digest_size=16)
    for layer, (a, b) in sorted(adapter.factors.items()):
        digest.update(
            f"{layer} {spec.for_layer(layer).scale}".encode()
            + a.float().numpy().tobytes()
            + b.float().numpy().tobytes()
        )
    return InputModel(model.label, model.directory, model.config, tensors, digest.hexdigest(), model.left_out)


_SAMPLE = 4096


def _fingerprint(stored: dict[str, StoredTensor]) -> str:
    """Of names, types, shapes, places and the first 4 kB of every tensor: cheap, and enough to tell models apart."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(stored.items()):
        digest.update(repr((name, str(tensor.dtype), tensor.shape, tensor.start, tensor.size)).encode())
        digest.update(tensor.first_bytes(_SAMPLE))
    return digest.hexdigest()
