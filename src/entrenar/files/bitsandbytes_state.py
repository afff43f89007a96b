"""What bitsandbytes writes beside a 4-bit weight, checked: nothing of it is believed because it happens to fit.

`W.quant_state.bitsandbytes__<format>` is a JSON text of the sizes, `W.absmax` the scale of every block, or with double
quantization its 8-bit code, `W.nested_absmax` the scale of every group of them, `W.quant_map` and `W.nested_quant_map`
the values that the codes stand for.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from entrenar.core.documents import parse_json
from entrenar.core.errors import InputError
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stored_tensor import StoredTensor
from entrenar.ops.blocks import block_count
from entrenar.quant.codebooks import codebook, dynamic_map
from entrenar.quant.registry import BLOCK_SIZES
from entrenar.quant.scales import GROUP

STATE = ".quant_state.bitsandbytes__"
NESTED = ("nested_absmax", "nested_quant_map")
BESIDE = ("absmax", "quant_map", *NESTED)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = tuple(_DTYPES.values())
_MAX_STATE_BYTES = 4096  # those that bitsandbytes writes have 150
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class QuantState:
    """The JSON text of one weight; `shape` and `dtype` are of the weight before it was quantized."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: int
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: tuple[int, ...]
    nested_blocksize: int | None = None
    nested_dtype: str | None = None
    nested_offset: float | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        return _DTYPES[self.dtype]

    @property
    def is_nested(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_blocksize is not None

    @property
    def blocks(self) -> int:
        """Number of scales."""
        return block_count(math.prod(self.shape), self.blocksize)


@dataclass(frozen=True)
class FourBitParts:
    """The stored tensors of one weight: `codes` as bytes, whatever type they are stored as (`quant_storage`)."""

    codes: StoredTensor
    scales: StoredTensor
    nested_scales: StoredTensor | None


def read_state(checkpoint: SafetensorsCheckpoint, name: str, key: str) -> QuantState:
    """The state of the weight `name` from the tensor `key`.

    Raises:
        InputError: it is no such text, or says what bitsandbytes never does.
    """
    where = f"{checkpoint.tensors[key].file.path}: {key}"
    stored = checkpoint.stored(key)
    if stored.dtype != torch.uint8 or len(stored.shape) != 1 or stored.size > _MAX_STATE_BYTES:
        raise InputError(
            f"{where} is {stored.dtype} of shape {stored.shape}, but a quant_state is a text of at most "
            f"{_MAX_STATE_BYTES} bytes: fetch or save the checkpoint again"
        )
    state = parse_json(stored.first_bytes(stored.size), where, QuantState)
    problem = _problem(state, key.partition(STATE)[2])
    if problem:
        raise InputError(f"{where}: {problem}: fetch or save {name} again")
    return state


def _problem(state: QuantState, format: str) -> str | None:
    """What of a state cannot be, in words."""
    if state.quant_type != format:
        return f"quant_type is {state.quant_type} where the tensor's own name says {format}"
    if state.blocksize not in BLOCK_SIZES:
        return f"blocksize is {state.blocksize}, not a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
    if not state.shape or any(size < 1 for size in state.shape):
        return f"shape is {list(state.shape)}"
    if state.nested_blocksize is None:
        stray = [key for key in ("nested_dtype", "nested_offset") if getattr(state, key) is not None]
        return f"it has {stray[0]} and no nested_blocksize" if stray else None
    if state.nested_blocksize != GROUP or state.nested_dtype != "float32":
        return f"its scales are of another layout than blocks of {GROUP} in float32, which are read"
    # Below zero it may be: a search for better scales (ours) finds some of them there.
    if state.nested_offset is None or not math.isfinite(state.nested_offset):
        return f"nested_offset is {state.nested_offset}, not a finite number"
    return None


def four_bit_parts(checkpoint: SafetensorsCheckpoint, name: str, state: QuantState) -> FourBitParts:
    """The tensors of the weight `name`, each of the size and type that its state asks for.

    Raises:
        InputError: one is missing, of another size or type, or there though the state says nothing of it.
    """
    parts = _Parts(checkpoint, name)
    codes = _as_bytes(parts.get(""))
    parts.check_size("", codes.size, block_count(math.prod(state.shape), 2), "bytes of codes")
    parts.check_map("quant_map", codebook(state.quant_type, _CPU))
    scales = parts.get("absmax")
    parts.check_size("absmax", scales.numel, state.blocks, "scales")
    if not state.is_nested:
        parts.check_type("absmax", _FLOATS)
        parts.check_absent(NESTED)
        return FourBitParts(codes, scales, None)
    parts.check_type("absmax", (torch.uint8,))
    parts.check_type("nested_absmax", _FLOATS)
    parts.check_map("nested_quant_map", dynamic_map(_CPU))
    nested = parts.get("nested_absmax")
    parts.check_size("nested_absmax", nested.numel, block_count(state.blocks, GROUP), "scales of scales")
    return FourBitParts(codes, scales, nested)


class _Parts:
    """The tensors beside one weight; `part` "" is the weight's own."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def get(self, part: str) -> StoredTensor:
        name = self._full(part)
        if name not in self._checkpoint.tensors:
            raise InputError(
                f"{self._checkpoint.path}: {self._name} is quantized by bitsandbytes but {name} is missing: fetch or "
                "save the checkpoint again"
            )
        return self._checkpoint.stored(name)

    def check_size(self, part: str, actual: int, wanted: int, what: str) -> None:
        if actual != wanted:
            self._refuse(part, f"has {actual} {what} where its quant_state asks for {wanted}")

    def check_type(self, part: str, allowed: tuple[torch.dtype, ...]) -> None:
        if self.get(part).dtype not in allowed:
            self._refuse(part, f"is {self.get(part).dtype}, not {' or '.join(map(str, allowed))}")

    def check_map(self, part: str, values: Tensor) -> None:
        stored = self.get(part)
        self.check_size(part, stored.numel, values.numel(), "values")
        if not torch.equal(stored.read().view(-1).float(), values):
            self._refuse(part, "is a codebook of its own: only bitsandbytes' usual ones of nf4 and fp4 are read")

    def check_absent(self, parts: tuple[str, ...]) -> None:
        for part in parts:
            if self._full(part) in self._checkpoint.tensors:
                self._refuse(part, "is there, but the quant_state says nothing of nested scales")

    def _full(self, part: str) -> str:
        return f"{self._name}.{part}" if part else self._name

    def _refuse(self, part: str, problem: str) -> None:
        raise InputError(f"{self._checkpoint.path}: {self._full(part)} {problem}")


def _as_bytes(stored: StoredTensor) -> StoredTensor:
    """The same bytes as elements of their own: FSDP has them stored as if they were floats."""
    return replace(stored, shape=(stored.size,), dtype=torch.uint8, decode=_same)


def _same(raw: Tensor) -> Tensor:
    return raw
