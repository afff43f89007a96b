"""bitsandbytes' checkpoints, written: 4-bit weights as bitsandbytes.py reads them and transformers loads them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entrenar.files.bitsandbytes_state import STATE
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.ops.blocks import block_count
from entrenar.quant.codebooks import codebook, dynamic_map
from entrenar.quant.scales import GROUP, as_float
from entrenar.quant.tensor import QuantizedTensor, quantize

_NESTED_STATE = {"nested_blocksize": GROUP, "nested_dtype": "float32"}
# As wide as any number that JSON writes for an offset: the header is written before the offset is known.
_OFFSET_ROOM = 26
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class FourBitLayout:
    """How 4-bit weights are to be written; `dtype`: what they are dequantized to."""

    format: str
    block_size: int
    double_quant: bool
    dtype: torch.dtype

    def quantize(self, name: str, weight: Tensor) -> QuantizedTensor:
        """One weight (out, in), its scales searched for; InputError, which calls it `name`, where that cannot be."""
        return quantize(
            weight, format=self.format, block_size=self.block_size, double_quant=self.double_quant, search=True,
            name=name,
        )  # fmt: skip

    def tensors(self, name: str, shape: tuple[int, int], make: Callable[[], QuantizedTensor]) -> list[LazyTensor]:
        """The tensors of one weight, in the order they are to be written; `make` is called once, for the first."""
        count = shape[0] * shape[1]
        blocks = block_count(count, self.block_size)
        weight = _SharedWeight(make)
        text = len(_state_text(shape, self, None))
        lazy = partial(_lazy, weight)
        plain = [
            lazy(name, (block_count(count, 2), 1), torch.uint8, lambda q: q.parts["codes"].view(-1, 1)),
            lazy(f"{name}.quant_map", (16,), torch.float32, lambda q: codebook(q.format, _CPU)),
        ]
        state = lazy(
            f"{name}{STATE}{self.format}", (text,), torch.uint8, lambda q: _state_bytes(shape, self, q), last=True
        )
        if not self.double_quant:
            scales = lazy(f"{name}.absmax", (blocks,), torch.float32, lambda q: as_float(q.parts["scales"]))
            return [*plain, scales, state]
        groups = (block_count(blocks, GROUP),)
        return [
            *plain,
            lazy(f"{name}.absmax", (blocks,), torch.uint8, lambda q: q.parts["scales"]),
            lazy(f"{name}.nested_absmax", groups, torch.float32, lambda q: as_float(q.parts["nested_scales"])),
            lazy(f"{name}.nested_quant_map", (256,), torch.float32, lambda _: dynamic_map(_CPU)),
            state,
        ]

    def config(self, skipped: list[str]) -> dict[str, Any]:
        """The quantization_config of config.json; `skipped`: modules that stay in 16 bits."""
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "bnb_4bit_quant_type": self.format, "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": _dtype_name(self), "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }  # fmt: skip


class _SharedWeight:
    """A weight that is quantized for the first of its tensors and let go after the last."""

    def __init__(self, make: Callable[[], QuantizedTensor]) -> None:
        self._make, self._weight = make, None

    def take(self, use: Callable[[QuantizedTensor], Tensor], last: bool) -> Tensor:
        weight = self._weight or self._make()
        self._weight = None if last else weight
        return use(weight)


def _lazy(
    weight: _SharedWeight, name: str, shape: tuple[int, ...], dtype: torch.dtype,
    use: Callable[[QuantizedTensor], Tensor], last: bool = False,
) -> LazyTensor:  # fmt: skip
    return LazyTensor(name, shape, lambda: weight.take(use, last), dtype=dtype)


def _state_text(shape: tuple[int, int], layout: FourBitLayout, offset: float | None) -> str:
    state: dict[str, Any] = {
        "quant_type": layout.format, "blocksize": layout.block_size, "dtype": _dtype_name(layout), "shape": list(shape),
    }  # fmt: skip
    if not layout.double_quant:
        return json.dumps(state)
    # JSON allows spaces after its value.
    text = json.dumps(state | _NESTED_STATE | {"nested_offset": 0.0 if offset is None else offset})
    return text.ljust(len(json.dumps(state | _NESTED_STATE | {"nested_offset": 0.0})) + _OFFSET_ROOM)


def _state_bytes(shape: tuple[int, int], layout: FourBitLayout, weight: QuantizedTensor) -> Tensor:
    offset = as_float(weight.parts["offset"]).item() if layout.double_quant else None
    return torch.tensor(list(_state_text(shape, layout, offset).encode()), dtype=torch.uint8)


def _dtype_name(layout: FourBitLayout) -> str:
    return str(layout.dtype).removeprefix("torch.")
