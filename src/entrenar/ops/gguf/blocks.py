"""GGUF's block types: quantize rows of a weight to ggml's bytes, and bytes back to numbers.

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 are equal to the `gguf` package's bytes, and all dequantized values to its values. Q4_K,
Q5_K and Q6_K are searched (gguf_k_reference.py); their squared error is below llama.cpp's.
"""

import warnings
from collections.abc import Callable

import gguf
import numpy as np
import torch
from torch import Tensor

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.blocks import chunk_elements
from entrenar.ops.gguf.decode_reference import DECODERS
from entrenar.ops.gguf.k_reference import SUPER_BLOCK, quantize_q4_k, quantize_q5_k, quantize_q6_k
from entrenar.ops.registration import call, define

_quantize = native.Function("quantize_gguf")
_dequantize = native.Function("dequantize_gguf")

_K_QUANTIZERS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "q4_k": quantize_q4_k,
    "q5_k": quantize_q5_k,
    "q6_k": quantize_q6_k,
}
IMPORTANCE_TYPES = tuple(_K_QUANTIZERS)
QUANTIZED_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", *IMPORTANCE_TYPES)
DEQUANTIZED_TYPES = tuple(DECODERS)
_CHUNK_BLOCKS = 4096  # super-blocks that the K reference works on at a time


def quantize_gguf(weight: Tensor, type: str, importance: Tensor | None = None) -> Tensor:
    """Blocks of every row.

    Args:
        weight: (rows, columns) float, finite; columns a multiple of the block (32, or 256 for K types).
        type: one of QUANTIZED_TYPES.
        importance: (columns,) float ≥ 0, how much an error in each column counts; K types only.
    Returns:
        (rows, bytes of a row) uint8.

    Raises:
        InputError: an unknown type, rows that are not whole blocks, or an importance that does not fit.
    """
    _check_type(type, QUANTIZED_TYPES, "quantized to")
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] % _block(type)[0]:
        raise InputError(
            f"a {weight.dtype} tensor of shape {tuple(weight.shape)} cannot be quantized to {type}: give a float "
            f"matrix whose rows are a multiple of {_block(type)[0]}"
        )
    if importance is not None and (type not in IMPORTANCE_TYPES or importance.shape != weight.shape[1:]):
        raise InputError(
            f"importance of shape {tuple(importance.shape)} does not fit: it is one number for each of the "
            f"{weight.shape[1]} columns, and only {', '.join(IMPORTANCE_TYPES)} use it"
        )
    return call("quantize_gguf", weight, type, None if importance is None else importance.float())


def dequantize_gguf(
    packed: Tensor, type: str, columns: int, dtype: torch.dtype = torch.float32, out: Tensor | None = None
) -> Tensor:
    """Values of the blocks of every row, computed in float32 and rounded once to `dtype`.

    Args:
        packed: (rows, bytes of a row) uint8; type: one of DEQUANTIZED_TYPES.
        out: a contiguous (rows, columns) tensor of `dtype` to write into, or None for a fresh one.
    Returns:
        (rows, columns) `dtype`.

    Raises:
        InputError: an unknown type, or bytes or a result tensor that do not fit the columns.
    """
    _check_type(type, DEQUANTIZED_TYPES, "dequantized from")
    elements, size = _block(type)
    if packed.dim() != 2 or packed.dtype != torch.uint8 or columns % elements:
        raise InputError(
            f"a {packed.dtype} tensor of shape {tuple(packed.shape)} is not {type} rows of {columns} columns: give a "
            f"uint8 matrix, and columns that are a multiple of {elements}"
        )
    if packed.shape[1] != columns // elements * size:
        raise InputError(
            f"{columns} columns of {type} are {columns // elements * size} bytes, but the rows have {packed.shape[1]}"
        )
    if out is None:
        return call("dequantize_gguf", packed, type, columns, dtype)
    if out.shape != (packed.shape[0], columns) or out.dtype != dtype or not out.is_contiguous():
        raise InputError(
            f"the result tensor is {out.dtype} of shape {tuple(out.shape)}: give a contiguous {dtype} one of shape "
            f"{(packed.shape[0], columns)}"
        )
    torch.ops.entrenar.dequantize_gguf_into(packed, type, out)
    return out


def _check_type(type: str, allowed: tuple[str, ...], verb: str) -> None:
    if type not in allowed:
        raise InputError(f"GGUF type {type!r} cannot be {verb}: allowed are {', '.join(allowed)}")


def _block(type: str) -> tuple[int, int]:
    """Elements and bytes of a block."""
    return gguf.GGML_QUANT_SIZES[_ggml(type)]


def _ggml(type: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[type.upper()]


# --- quantize ---


def _quantize_reference(weight: Tensor, type: str, importance: Tensor | None) -> Tensor:
    if weight.numel() == 0:
        return _quantize_fake(weight, type, importance)
    if type in _K_QUANTIZERS:
        return _k_reference(weight, type, importance)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):  # a scale may overflow float16
        packed = gguf.quants.quantize(weight.detach().float().cpu().numpy(), _ggml(type))
    blocks = torch.from_numpy(packed)
    if type in ("q4_1", "q5_1"):
        _settle_zero_minimum(weight.detach().cpu().reshape(-1, 32), blocks.view(-1, _block(type)[1]))
    return blocks.to(weight.device)


def _settle_zero_minimum(values: Tensor, blocks: Tensor) -> None:
    """Of zeros of both signs the first is the minimum, as in llama.cpp; numpy's choice depends on its vectors."""
    first_zero = (values == 0).to(torch.uint8).argmax(dim=1, keepdim=True)
    negative = values.gather(1, first_zero).signbit().flatten()
    is_zero = values.amin(dim=1) == 0
    blocks[is_zero, 3] = negative[is_zero].to(torch.uint8) << 7  # the high byte of the minimum


def _k_reference(weight: Tensor, type: str, importance: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    blocks = weight.detach().float().cpu().reshape(-1, SUPER_BLOCK)
    weights = None if importance is None else importance.cpu().expand(rows, columns).reshape(-1, SUPER_BLOCK)
    parts = [slice(start, start + _CHUNK_BLOCKS) for start in range(0, len(blocks), _CHUNK_BLOCKS)]
    quantize = _K_QUANTIZERS[type]
    packed = torch.cat([quantize(blocks[part], None if weights is None else weights[part]) for part in parts])
    return packed.view(rows, -1).to(weight.device)


def _quantize_native(weight: Tensor, type: str, importance: Tensor | None) -> Tensor:
    out = _quantize_fake(weight, type, importance)
    _quantize(
        weight.contiguous(), out, None if importance is None else importance.contiguous(),
        *weight.shape, _ggml(type), native.DTYPES[weight.dtype], native.threads(),
    )  # fmt: skip
    return out


def _quantize_fake(weight: Tensor, type: str, _importance: Tensor | None) -> Tensor:
    elements, size = _block(type)
    return weight.new_empty((weight.shape[0], weight.shape[1] // elements * size), dtype=torch.uint8)


# --- dequantize ---


def _dequantize_reference(packed: Tensor, type: str, columns: int, dtype: torch.dtype) -> Tensor:
    out = _dequantize_fake(packed, type, columns, dtype)
    _dequantize_reference_into(packed, type, out)
    return out


def _dequantize_reference_into(packed: Tensor, type: str, out: Tensor) -> None:
    elements, size = _block(type)
    blocks, values, decode = packed.reshape(-1, size), out.view(-1, elements), DECODERS[type]
    step = max(chunk_elements(packed.device) // elements, 1)
    for start in range(0, len(blocks), step):
        values[start : start + step] = decode(blocks[start : start + step])


def _dequantize_native(packed: Tensor, type: str, columns: int, dtype: torch.dtype) -> Tensor:
    out = _dequantize_fake(packed, type, columns, dtype)
    _dequantize_native_into(packed, type, out)
    return out


def _dequantize_native_into(packed: Tensor, type: str, out: Tensor) -> None:
    _dequantize(packed.contiguous(), out, *out.shape, _ggml(type), native.DTYPES[out.dtype], native.threads())


def _dequantize_fake(packed: Tensor, _type: str, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


define(
    "quantize_gguf(Tensor weight, str type, Tensor? importance) -> Tensor",
    reference=_quantize_reference,
    native_cpu=_quantize_native,
    fake=_quantize_fake,
    accepts=lambda weight, _type, _importance: weight.dtype in native.DTYPES,
)
define(
    "dequantize_gguf(Tensor packed, str type, SymInt columns, ScalarType dtype) -> Tensor",
    reference=_dequantize_reference,
    native_cpu=_dequantize_native,
    fake=_dequantize_fake,
    accepts=lambda _packed, _type, _columns, dtype: dtype in native.DTYPES,
)
define(
    "dequantize_gguf_into(Tensor packed, str type, Tensor(a!) out) -> ()",
    reference=_dequantize_reference_into,
    native_cpu=_dequantize_native_into,
    fake=lambda *_args: None,
    accepts=lambda _packed, _type, out: out.dtype in native.DTYPES,
)
