"""Checkpoints that come quantized: what a reader or a writer of one offers, and every one there is.

Loading, matching, merging, exporting and the memory plan know only what stands here. A new kind of checkpoint (GPTQ,
say) is a file with a class like `BitsandbytesWeights` and a row in `PREQUANTIZED`; one that is written too is a class
like `FourBitLayout` and a row in `WRITTEN`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from entrenar.files import bitsandbytes
from entrenar.files.bitsandbytes_output import FourBitLayout
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stored_tensor import StoredTensor
from entrenar.quant.tensor import QuantizedTensor


class PrequantizedWeight(Protocol):
    """A quantized weight in its file, read whole or from any element on; InputError where it is broken."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands for."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it is dequantized to."""
        ...

    def read(self) -> QuantizedTensor:
        """The weight, not quantized again."""
        ...

    def read_range(self, start: int, count: int) -> Tensor:
        """The `count` elements from `start` of the flat weight, (count,) float32."""
        ...


class PrequantizedWeights(Protocol):
    """The tensors of a checkpoint under the names of its weights, without the scales and states beside them."""

    @property
    def checkpoint(self) -> SafetensorsCheckpoint:
        """The files as they are."""
        ...

    def names(self) -> list[str]:
        """Every tensor's name, quantized or not."""
        ...

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies, of a quantized weight its codes; nothing is read."""
        ...

    def formats(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → number format (a row of quant/registry.py) and shape of every quantized weight."""
        ...

    def weight(self, name: str) -> PrequantizedWeight:
        """A quantized weight."""
        ...

    def bytes_of(self, name: str) -> int:
        """What `weight(name).read()` holds."""
        ...


class PrequantizedLayout(Protocol):
    """How a checkpoint is written with the weights of its linear layers quantized."""

    def quantize(self, name: str, weight: Tensor) -> QuantizedTensor:
        """One weight (out, in); InputError, which calls it `name`, where that cannot be."""
        ...

    def tensors(self, name: str, shape: tuple[int, int], make: Callable[[], QuantizedTensor]) -> list[LazyTensor]:
        """The tensors of one weight, in the order they are to be written; `make` is called once, for the first."""
        ...

    def config(self, skipped: list[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json; `skipped`: modules that stay in 16 bits."""
        ...


@dataclass(frozen=True, kw_only=True)
class PrequantizedKind:
    """One kind of checkpoint.

    describes(section) → whether what a config.json says under `quantization_config` is this kind. recognises(names) →
    whether tensors of these names are of it. claims(name, names) → whether a tensor that holds codes is a weight of it,
    names being sorted. weight_of(name) → the weight that a tensor is a part of; any other tensor itself.
    open(checkpoint) → its reader.
    """

    describes: Callable[[Mapping[str, Any]], bool]
    recognises: Callable[[Iterable[str]], bool]
    claims: Callable[[str, list[str]], bool]
    weight_of: Callable[[str], str]
    open: Callable[[SafetensorsCheckpoint], PrequantizedWeights]


PREQUANTIZED = [
    PrequantizedKind(
        describes=bitsandbytes.describes,
        recognises=bitsandbytes.is_bitsandbytes,
        claims=bitsandbytes.claims,
        weight_of=bitsandbytes.weight_of,
        open=bitsandbytes.BitsandbytesWeights,
    )
]

# Type of an export → its layout. nf4: 4.127 bits a weight, doubly quantized, and the smallest error that bitsandbytes'
# layout has, as scales are searched for.
WRITTEN: dict[str, PrequantizedLayout] = {
    "nf4": FourBitLayout("nf4", 64, double_quant=True, dtype=torch.bfloat16),
}


def open_prequantized(checkpoint: SafetensorsCheckpoint) -> PrequantizedWeights | None:
    """The reader of a checkpoint that comes quantized; None where it holds plain numbers."""
    names = list(checkpoint.names())
    kind = next((kind for kind in PREQUANTIZED if kind.recognises(names)), None)
    return None if kind is None else kind.open(checkpoint)


def weight_of(name: str) -> str:
    """The weight that a tensor of a prequantized checkpoint is a part of; any other tensor itself."""
    return next((weight for kind in PREQUANTIZED if (weight := kind.weight_of(name)) != name), name)
