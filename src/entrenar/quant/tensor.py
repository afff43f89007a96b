"""QuantizedTensor and the functions that make and undo one."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.ops.blocks import block_count
from entrenar.ops.linear.gguf import FLOAT_TYPES, columns_of
from entrenar.quant.formats.gguf import BLOCK_SIZES as GGUF_BLOCK_SIZES
from entrenar.quant.registry import AS_STORED_FORMATS, BLOCK_SIZES, check_block_size, get_format, held_format
from entrenar.quant.scales import GROUP, Parts, as_float

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight in a block format: plain uint8 tensors and what is needed to read them.

    Attributes:
        format: name in the registry.
        shape: original shape; blocks run over the flattened row-major weight.
        dtype: dtype the weight had before.
        block_size: elements per scale (a row's length for int8 per row); in a block of GGUF.
        parts: `codes`, `scales`, and with double quantization `nested_scales` (and `offset` for nf4, fp4); all uint8.
            A type of GGUF has `codes` alone, (rows, bytes of a row).
        searched: whether the scales were chosen for the least error; reading does not need to know.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    parts: Parts
    searched: bool = False

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.parts["codes"].device

    @property
    def is_double_quantized(self) -> bool:
        """Whether the block scales are themselves held in 8 bits."""
        return "nested_scales" in self.parts

    @property
    def memory_bytes(self) -> int:
        """Bytes really held: the sum over all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def compression_ratio(self) -> float:
        """Bytes of the original dtype per byte held."""
        return self.numel * self.dtype.itemsize / self.memory_bytes if self.memory_bytes else 1.0

    def to(self, device: torch.device) -> "QuantizedTensor":
        """The same on another device."""
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in its original shape, rounded once from float32 to `dtype`."""
        flat = held_format(self.format).dequantize(self.parts, self.block_size, self.numel, dtype)
        return flat.view(self.shape)


def quantize(
    weight: Tensor,
    *,
    format: str,
    block_size: int | None = 64,
    double_quant: bool = False,
    search: bool = False,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize a float weight of any shape.

    Args:
        weight: float32, float16 or bfloat16, any shape, any strides.
        format: a name of the registry.
        block_size: elements per scale, a power of two from 16 to 4096; None with int8 means one scale a row.
        double_quant: hold the scales in 8 bits.
        search: choose each block's scale for the least squared error, for nf4 and fp4: the same bytes to the decoder,
            about 18% less error on normal weights, several times slower.
        name: what an error calls the tensor.

    Raises:
        InputError: unknown format, block size or dtype, or a non-finite value in the weight.
    """
    row = get_format(format)
    _check_dtype(weight.dtype, name)
    if block_size is None:
        if format != "int8":
            raise InputError(
                f"block_size is None, one scale a row, but that is int8's alone: give {format} a block size"
            )
        block_size = max(weight.shape[-1], 1) if weight.dim() else 1
    else:
        check_block_size(block_size)
    parts = row.quantize(weight.detach().reshape(-1), block_size, double_quant, search)
    _check_finite(parts, name)
    return QuantizedTensor(format, tuple(weight.shape), weight.dtype, block_size, parts, search)


def requantize(weight: Tensor, like: QuantizedTensor) -> QuantizedTensor:
    """A float weight in the format, and as if it had the dtype, of another one of its shape.

    Raises:
        InputError: the other one is kept as a GGUF has it, and so is not made anew; or see `quantize`.
    """
    if like.format in AS_STORED_FORMATS:
        raise InputError(
            f"its base is kept in a GGUF's own blocks ({like.format}), which nothing changes: load it as nf4 or none"
        )
    whole_rows = like.format == "int8" and like.block_size not in BLOCK_SIZES
    return quantize(
        weight.to(like.dtype), format=like.format, block_size=None if whole_rows else like.block_size,
        double_quant=like.is_double_quantized, search=like.searched,
    )  # fmt: skip


class PieceQuantizer:
    """`quantize` for a weight that comes piece by piece, to the same bytes.

    Args:
        shape, dtype: of the whole weight.
        format, block_size, double_quant, search, name: as for `quantize`.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype,
        *, format: str, block_size: int, double_quant: bool, search: bool = False, name: str,
    ) -> None:  # fmt: skip
        self._format, count = get_format(format), math.prod(shape)
        self._encode, self._search = self._format.encoder(search), search
        check_block_size(block_size)
        _check_dtype(dtype, name)
        self._shape, self._dtype, self._block_size = shape, dtype, block_size
        self._double_quant, self._name = double_quant, name
        self._codes = torch.empty(block_count(count * self._format.bits, 8), dtype=torch.uint8)
        self._scales = torch.empty(block_count(count, block_size), dtype=torch.float32)

    def take(self, start: int, piece: Tensor) -> None:
        """The elements from `start` on, (n,) of the weight's dtype, whole blocks unless they are the last ones.

        In any order, and from several threads at once.
        """
        codes, scales = self._encode(piece, self._block_size)
        first_code, first_scale = start * self._format.bits // 8, start // self._block_size
        self._codes[first_code : first_code + len(codes)] = codes
        self._scales[first_scale : first_scale + len(scales)] = scales

    def finish(self) -> QuantizedTensor:
        """The weight, once everything is taken; InputError if a value was not finite."""
        parts = {"codes": self._codes} | self._format.hold(self._scales, self._double_quant)
        _check_finite(parts, self._name)
        return QuantizedTensor(self._format.name, self._shape, self._dtype, self._block_size, parts, self._search)


def as_stored_tensor(blocks: Tensor, type: str) -> QuantizedTensor:
    """A weight as a GGUF holds it: blocks (rows, bytes of a row) uint8 of one of AS_STORED_FORMATS, not converted."""
    dtype = FLOAT_TYPES.get(type, torch.float32)
    shape = (blocks.shape[0], columns_of(blocks, type))
    return QuantizedTensor(type, shape, dtype, GGUF_BLOCK_SIZES[type], {"codes": blocks})


def quantize_4bit(
    weight: Tensor,
    *,
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    search: bool = False,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize to `int4`, `nf4` or `fp4`; see `quantize`. nf4 and fp4 without `search` are bitsandbytes' bytes."""
    if get_format(format).bits != 4:
        raise InputError(f"{format} is not a 4-bit format: quantize_4bit takes int4, nf4 or fp4")
    return quantize(weight, format=format, block_size=block_size, double_quant=double_quant, search=search, name=name)


def dequantize_4bit(quantized: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight in its original shape as `dtype`."""
    return quantized.dequantize(dtype)


def packed_bytes(count: int, format: str, block_size: int, double_quant: bool) -> int:
    """Bytes that `count` weights take once quantized: what `memory_bytes` will say, without quantizing."""
    blocks = block_count(count, block_size)
    codes = block_count(count * get_format(format).bits, 8)
    if not double_quant:
        return codes + 4 * blocks
    offset = 4 if format in ("nf4", "fp4") else 0
    return codes + blocks + 4 * block_count(blocks, GROUP) + offset


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in _FLOATS:
        raise InputError(f"{name} is {dtype}: quantization takes float32, float16 or bfloat16")


def _check_finite(parts: Parts, name: str) -> None:
    """A NaN or infinity in a block always reaches its scale, unsigned: the largest tells for all."""
    scales = as_float(parts.get("nested_scales", parts["scales"]))
    if scales.numel() and not scales.amax().isfinite():
        raise InputError(f"{name} holds a NaN or an infinity: quantization takes finite weights only, check its source")
