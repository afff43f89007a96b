"""Checkpoints that come quantized: what a reader of one offers, and every reader there is.

Loading, matching, merging, exporting and the memory plan know only what stands here. A new kind of checkpoint (GPTQ,
say) is a file with a class like `BitsandbytesWeights` and a row in `PREQUANTIZED`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from entrenar.files import bitsandbytes
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
    """The tensors of a checkpoint under the names of its weights; scales and states beside them are not told."""

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


@dataclass(frozen=True, kw_only=True)
class PrequantizedKind:
    """One kind of checkpoint.

    methods: what its config.json calls it (`quantization_config.quant_method`).
    recognises(names) → whether tensors of these names are of this kind. claims(name, names) → whether a tensor that
    holds codes is a weight of it, names being sorted. open(checkpoint) → its reader.
    """

    methods: tuple[str, ...]
    recognises: Callable[[Iterable[str]], bool]
    claims: Callable[[str, list[str]], bool]
    open: Callable[[SafetensorsCheckpoint], PrequantizedWeights]


PREQUANTIZED = [
    PrequantizedKind(
        methods=("bitsandbytes",),
        recognises=bitsandbytes.is_bitsandbytes,
        claims=bitsandbytes.claims,
        open=bitsandbytes.BitsandbytesWeights,
    )
]


def open_prequantized(checkpoint: SafetensorsCheckpoint) -> PrequantizedWeights | None:
    """The reader of a checkpoint that comes quantized; None where it holds plain numbers."""
    names = list(checkpoint.names())
    kind = next((kind for kind in PREQUANTIZED if kind.recognises(names)), None)
    return None if kind is None else kind.open(checkpoint)
