"""bitsandbytes' checkpoints, read: 4-bit weights (nf4, fp4, plain or double quantized) and LLM.int8.

A 4-bit weight `W` (out, in) is `W` U8 (numel / 2, 1), or the same bytes stored as another type (`quant_storage`), with
`W.absmax`, `W.quant_map` (16,), with double quantization also `W.nested_absmax` and `W.nested_quant_map` (256,), and
`W.quant_state.bitsandbytes__<format>`, a JSON text as U8 (bitsandbytes_state.py).
An int8 weight is `W` I8 (out, in) with `SCB` F32 (out,) beside it: W = q · SCB / 127. Nothing is quantized again.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.files.bitsandbytes_state import BESIDE, STATE, QuantState, four_bit_parts, read_state
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stored_tensor import StoredTensor
from entrenar.ops.blocks import block_count
from entrenar.quant.registry import get_format
from entrenar.quant.scales import GROUP, as_bytes
from entrenar.quant.tensor import QuantizedTensor

_SCALE_BYTES = 4  # in memory they are float32, as an offset is


@dataclass(frozen=True, eq=False)
class BitsandbytesWeight:
    """A quantized weight in its file, read whole or from any element on.

    Attributes:
        format, shape, dtype, block_size: as of a QuantizedTensor.
        codes, scales: of all blocks; int8's scales are a row's largest magnitude. nested_scales, offset: of the scales
            where they are quantized too.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    codes: StoredTensor
    scales: StoredTensor
    nested_scales: StoredTensor | None = None
    offset: float = 0.0

    def read(self) -> QuantizedTensor:
        """The weight, its bytes as they are."""
        return self._blocks(0, self.shape)

    def read_range(self, start: int, count: int) -> Tensor:
        """The `count` elements from `start` of the flat weight, (count,) float32."""
        group = self.block_size * (GROUP if self.nested_scales else 1)
        first = start // group * group
        return self._blocks(first, (start + count - first,)).dequantize()[start - first :]

    def _blocks(self, first: int, shape: tuple[int, ...]) -> QuantizedTensor:
        """The elements from `first`, where a block and a group of scales begin, on."""
        end, bits = first + math.prod(shape), get_format(self.format).bits
        blocks = (first // self.block_size, block_count(end, self.block_size))
        parts = {"codes": _read(self.codes, first * bits // 8, block_count(end * bits, 8)).view(torch.uint8)}
        scales = _read(self.scales, *blocks)
        if self.nested_scales is not None:
            nested = self._finite(_read(self.nested_scales, blocks[0] // GROUP, block_count(blocks[1], GROUP)))
            parts |= {"scales": scales, "nested_scales": as_bytes(nested)}
            parts["offset"] = as_bytes(torch.tensor([self.offset]))
        else:
            scales = self._finite(scales)
            parts["scales"] = as_bytes(scales / 127 if self.format == "int8" else scales)
        return QuantizedTensor(self.format, shape, self.dtype, self.block_size, parts)

    def _finite(self, scales: Tensor) -> Tensor:
        if not scales.isfinite().all():
            raise InputError(f"{self.codes.file.path} holds scales that are not finite: fetch or save it again")
        return scales


def _read(stored: StoredTensor, start: int, end: int) -> Tensor:
    """The elements [start, end), flat, in memory of their own."""
    return stored.read_range(start, end - start, torch.empty(stored.bytes_of(end - start), dtype=torch.uint8))


class BitsandbytesWeights:
    """The tensors of a checkpoint without bitsandbytes' own beside the weights; see `files.prequantized`.

    Raises:
        InputError: two states for one weight, or a state or scales without a weight.
    """

    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._states: dict[str, str] = {}  # weight → the tensor that is its state
        self._int8: list[str] = []
        for name in checkpoint.names():
            weight, separator, _ = name.partition(STATE)
            if separator:
                self._add(weight, name)
                self._states[weight] = name
            elif name.rpartition(".")[2] == "SCB":
                weight = f"{name.removesuffix('SCB')}weight"
                self._add(weight, name)
                self._int8.append(weight)
        self.stored = checkpoint.stored
        hidden = {f"{weight}.{part}" for weight in self._states for part in BESIDE} | set(self._states.values())
        for weight in self._int8:
            owner = weight.removesuffix("weight")
            hidden |= {f"{owner}SCB", f"{owner}weight_format"}
        self._names = [name for name in checkpoint.names() if name not in hidden]

    def _add(self, weight: str, beside: str) -> None:
        if weight not in self.checkpoint.tensors:
            raise InputError(f"{self.checkpoint.path} has {beside} but no {weight}: fetch or save it again")
        if weight in self._states or weight in self._int8:
            raise InputError(f"{self.checkpoint.path}: {weight} has more than one quant_state: fetch or save it again")

    def names(self) -> list[str]:
        """Every weight's name."""
        return self._names

    def formats(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → number format and shape of every quantized weight.

        Raises:
            InputError: the state of a weight is not one.
        """
        states = {name: self._state(name) for name in self._states}
        four_bit = {name: (str(state.quant_type), state.shape) for name, state in states.items()}
        return four_bit | {name: ("int8", self.checkpoint.tensors[name].shape) for name in self._int8}

    def bytes_of(self, name: str) -> int:
        """Bytes of a quantized weight that is read; InputError as `weight`."""
        weight = self.weight(name)
        if weight.nested_scales is None:
            return weight.codes.size + _SCALE_BYTES * weight.scales.numel
        return weight.codes.size + weight.scales.size + _SCALE_BYTES * (weight.nested_scales.numel + 1)  # the offset

    def weight(self, name: str) -> BitsandbytesWeight:
        """A quantized weight in its file.

        Raises:
            InputError: tensors that are missing or do not fit each other, or a codebook, block size or layout that is
                not bitsandbytes' usual one.
        """
        return self._four_bit(name) if name in self._states else self._eight_bit(name)

    def _state(self, name: str) -> QuantState:
        return read_state(self.checkpoint, name, self._states[name])

    def _four_bit(self, name: str) -> BitsandbytesWeight:
        state = self._state(name)
        parts = four_bit_parts(self.checkpoint, name, state)
        return BitsandbytesWeight(
            state.quant_type, state.shape, state.torch_dtype, state.blocksize,
            parts.codes, parts.scales, parts.nested_scales, state.nested_offset or 0.0,
        )  # fmt: skip

    def _eight_bit(self, name: str) -> BitsandbytesWeight:
        where = f"{self.checkpoint.tensors[name].file.path}: {name}"
        owner = name.removesuffix("weight")
        codes, largest = self.checkpoint.stored(name), self.checkpoint.stored(f"{owner}SCB")
        plain = codes.dtype == torch.int8 and len(codes.shape) == 2 and largest.dtype.is_floating_point
        plain = plain and codes.numel > 0
        if not plain or largest.shape != codes.shape[:1]:
            raise InputError(f"{where} is not an LLM.int8 weight with a scale a row: save it again")
        order = f"{owner}weight_format"
        if order in self.checkpoint.tensors and any(self.checkpoint.stored(order).first_bytes(8)):
            raise InputError(f"{where} is LLM.int8 in the order of a GPU (weight_format is not 0): save it row by row")
        return BitsandbytesWeight("int8", codes.shape, torch.float16, codes.shape[1], codes, largest)


def claims(name: str, names: list[str]) -> bool:
    """Whether bitsandbytes' own tensors lie beside a weight; `names` sorted."""
    scales, state = f"{name.removesuffix('weight')}SCB", f"{name}{STATE}"
    at, state_at = bisect_left(names, scales), bisect_left(names, state)
    return names[at : at + 1] == [scales] or any(one.startswith(state) for one in names[state_at : state_at + 1])


def is_bitsandbytes(names: Iterable[str]) -> bool:
    """Whether names of tensors are those of such a checkpoint."""
    return any(STATE in name or name.rpartition(".")[2] == "SCB" for name in names)


def describes(section: Mapping[str, Any]) -> bool:
    """Whether what a config.json says of its quantization is this; old ones do not name it."""
    method = section.get("quant_method") or section.get("quant_algo")
    if method:
        return method == "bitsandbytes"
    return any(str(key).startswith(("load_in_", "bnb_")) for key in section)


def weight_of(name: str) -> str:
    """The weight that a tensor is a part of; any other tensor itself."""
    weight, separator, _ = name.partition(".weight.")
    if separator:
        return f"{weight}.weight"
    owner, _, leaf = name.rpartition(".")
    return f"{owner}.weight" if leaf in ("SCB", "weight_format") else name
