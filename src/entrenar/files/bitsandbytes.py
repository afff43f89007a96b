"""bitsandbytes' checkpoints: 4-bit weights (nf4, fp4, plain or double quantized) and LLM.int8, both ways.

A 4-bit weight `W` (out, in) is `W` U8 (numel / 2, 1), or the same bytes stored as another type (`quant_storage`), with
`W.absmax`, `W.quant_map` (16,), with double quantization also `W.nested_absmax` and `W.nested_quant_map` (256,), and
`W.quant_state.bitsandbytes__<format>`, a JSON text as U8 (bitsandbytes_state.py).
An int8 weight is `W` I8 (out, in) with `SCB` F32 (out,) beside it: W = q · SCB / 127. Nothing is quantized again.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.files.bitsandbytes_state import BESIDE, STATE, QuantState, four_bit_parts, read_state
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stored_tensor import StoredTensor
from entrenar.ops.blocks import block_count
from entrenar.quant.codebooks import codebook, dynamic_map
from entrenar.quant.registry import get_format
from entrenar.quant.scales import GROUP, as_bytes, as_float
from entrenar.quant.tensor import QuantizedTensor

_NESTED_STATE = {"nested_blocksize": GROUP, "nested_dtype": "float32"}
# As wide as any number that JSON writes for an offset: the header is written before the offset is known.
_OFFSET_ROOM = 26
_SCALE_BYTES = 4  # held as float32, as an offset is
_CPU = torch.device("cpu")


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
        found = {name: (str(state.quant_type), state.shape) for name, state in states.items()}
        return found | {name: ("int8", self.checkpoint.tensors[name].shape) for name in self._int8}

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


@dataclass(frozen=True)
class Layout:
    """How a 4-bit weight is to be written; `dtype`: what it is dequantized to."""

    format: str
    block_size: int
    double_quant: bool
    dtype: torch.dtype


def four_bit_tensors(
    name: str, shape: tuple[int, int], layout: Layout, make: Callable[[], QuantizedTensor]
) -> list[LazyTensor]:
    """The tensors of one 4-bit weight, in the order they are to be written; `make` is called once, for the first."""
    count = shape[0] * shape[1]
    blocks = block_count(count, layout.block_size)
    held = _Held(make)
    text = len(_state_text(shape, layout, None))
    lazy = partial(_lazy, held)
    plain = [
        lazy(name, (block_count(count, 2), 1), torch.uint8, lambda q: q.parts["codes"].view(-1, 1)),
        lazy(f"{name}.quant_map", (16,), torch.float32, lambda q: codebook(q.format, _CPU)),
    ]
    state = lazy(
        f"{name}{STATE}{layout.format}", (text,), torch.uint8, lambda q: _state_bytes(shape, layout, q), last=True
    )
    if not layout.double_quant:
        return [*plain, lazy(f"{name}.absmax", (blocks,), torch.float32, lambda q: as_float(q.parts["scales"])), state]
    groups = (block_count(blocks, GROUP),)
    return [
        *plain,
        lazy(f"{name}.absmax", (blocks,), torch.uint8, lambda q: q.parts["scales"]),
        lazy(f"{name}.nested_absmax", groups, torch.float32, lambda q: as_float(q.parts["nested_scales"])),
        lazy(f"{name}.nested_quant_map", (256,), torch.float32, lambda _: dynamic_map(_CPU)),
        state,
    ]


def quantization_config(layout: Layout, skipped: list[str]) -> dict[str, Any]:
    """What config.json says of a 4-bit checkpoint; `skipped`: modules that stay in 16 bits."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": layout.format, "bnb_4bit_use_double_quant": layout.double_quant,
        "bnb_4bit_compute_dtype": _dtype_name(layout), "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }  # fmt: skip


class _Held:
    """A weight that is made for the first of its tensors and let go after the last."""

    def __init__(self, make: Callable[[], QuantizedTensor]) -> None:
        self._make, self._weight = make, None

    def take(self, use: Callable[[QuantizedTensor], Tensor], last: bool) -> Tensor:
        weight = self._weight or self._make()
        self._weight = None if last else weight
        return use(weight)


def _lazy(
    held: _Held, name: str, shape: tuple[int, ...], dtype: torch.dtype, use: Callable[[QuantizedTensor], Tensor],
    last: bool = False,
) -> LazyTensor:  # fmt: skip
    return LazyTensor(name, shape, lambda: held.take(use, last), dtype=dtype)


def _state_text(shape: tuple[int, int], layout: Layout, offset: float | None) -> str:
    state: dict[str, Any] = {
        "quant_type": layout.format, "blocksize": layout.block_size, "dtype": _dtype_name(layout), "shape": list(shape),
    }  # fmt: skip
    if not layout.double_quant:
        return json.dumps(state)
    # JSON allows spaces after its value.
    text = json.dumps(state | _NESTED_STATE | {"nested_offset": 0.0 if offset is None else offset})
    return text.ljust(len(json.dumps(state | _NESTED_STATE | {"nested_offset": 0.0})) + _OFFSET_ROOM)


def _state_bytes(shape: tuple[int, int], layout: Layout, weight: QuantizedTensor) -> Tensor:
    offset = as_float(weight.parts["offset"]).item() if layout.double_quant else None
    return torch.tensor(list(_state_text(shape, layout, offset).encode()), dtype=torch.uint8)


def _dtype_name(layout: Layout) -> str:
    return str(layout.dtype).removeprefix("torch.")
