"""The boundary to csrc/ as Python knows it: structures, functions and constants of csrc/abi/abi.h.

The library tells its own layout (csrc/abi/abi.cpp), in the words of `text`: a library that says anything else was built
from other sources and is not used (native/library.py). So this file and that header cannot drift apart in silence.
"""

import ctypes
from collections.abc import Iterator
from typing import cast

Fields = tuple[tuple[str, type], ...]
_ADDRESS, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def _of(kind: type, *names: str) -> Fields:
    return tuple((name, kind) for name in names)


def _buffers(*names: str) -> Fields:
    """Address and bytes of each."""
    return tuple(field for name in names for field in ((name, _ADDRESS), (f"{name}_bytes", _LONG)))


class ScaleBuffers(ctypes.Structure):
    """Block scales, plain or held in 8 bits."""

    _fields_ = _buffers("values", "group", "offset", "map")


class SourceView(ctypes.Structure):
    """A weight (rows, columns) of some kind."""

    _fields_ = (
        *_of(_INT, "kind", "dtype"), *_of(_LONG, "rows", "columns", "stride"), ("scale", _FLOAT), ("unused", _INT),
        ("block_size", _LONG), *_buffers("data"), ("scales", ScaleBuffers), *_buffers("codebook"),
    )  # fmt: skip


class TermView(ctypes.Structure):
    """One product of a sum: A and its weight."""

    _fields_ = (
        *_buffers("a"), *_of(_LONG, "a_stride", "inner"), *_of(_INT, "transposed", "unused"), ("source", SourceView),
    )  # fmt: skip


class MemberView(ctypes.Structure):
    """A linear layer with or without low-rank factors."""

    _fields_ = (
        *_of(SourceView, "weight", "a", "b"), *_buffers("bias", "y", "da", "db"), ("rank", _LONG), ("scale", _FLOAT),
        ("unused", _INT),
    )  # fmt: skip


class GroupView(ctypes.Structure):
    """Linear layers that share an input."""

    _fields_ = (*_buffers("x", "dx", "residual", "u"), *_of(_LONG, "tokens", "inner", "count"), ("members", _ADDRESS))


class HeadsView(ctypes.Structure):
    """A (batch, tokens, heads, width) tensor with strides."""

    _fields_ = (("data", _ADDRESS), *_of(_LONG, "bytes", "batch", "token", "head"))


class AttentionView(ctypes.Structure):
    """Causal attention over q, k and v."""

    _fields_ = (
        *_of(_LONG, "batch", "tokens", "heads", "kv_heads", "width"), *_buffers("starts"), ("scale", _FLOAT),
        ("unused", _INT), *_of(HeadsView, "q", "k", "v"),
    )  # fmt: skip


class BufferView(ctypes.Structure):
    """A buffer of a residual block; without an address it is not there."""

    _fields_ = (("data", _ADDRESS), ("bytes", _LONG))


class NormView(ctypes.Structure):
    """An RMS norm's weight; without an address there is no norm."""

    _fields_ = (
        ("weight", _ADDRESS), ("bytes", _LONG), ("dtype", _INT), *_of(_FLOAT, "eps", "offset"), ("unused", _INT),
    )  # fmt: skip


class MlpBlockView(ctypes.Structure):
    """The residual block of an MLP."""

    _fields_ = (
        *_of(_LONG, "tokens", "hidden", "inner"), ("norm", NormView),
        *_of(BufferView, "h", "x", "gate", "up", "product", "u", "down_u", "out", "dh"),
        ("members", MemberView * 3), *_of(_INT, "activation", "unused"),
    )  # fmt: skip


class AttentionBlockView(ctypes.Structure):
    """The residual block of attention."""

    _fields_ = (
        *_of(_LONG, "batch", "tokens", "hidden", "heads", "kv_heads", "width"),
        *_of(NormView, "norm", "q_norm", "k_norm"),
        *_of(BufferView, "h", "x", "q", "k", "v", "o", "lse", "u", "output_u", "out", "dh", "cos", "sin"),
        *_of(_LONG, "rotary_batches", "rotated"), ("starts", BufferView), ("members", MemberView * 4),
        ("scale", _FLOAT), ("rotary_dtype", _INT),
    )  # fmt: skip


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    ScaleBuffers, SourceView, TermView, MemberView, GroupView, HeadsView, AttentionView, BufferView, NormView,
    MlpBlockView, AttentionBlockView,
)  # fmt: skip

# A letter an argument: b a buffer (a contiguous CPU tensor or None, passed as address and bytes), s one with strides
# (address of its first element, bytes from there to the end of its storage), p an address, n an int64, i an int,
# f a float.
FUNCTIONS = {
    "adapted": "pi",
    "adapted_backward": "pi",
    "attention_backward": "pbbbbbbi",
    "attention": "pbbi",
    "attention_block": "pi",
    "attention_block_backward": "pi",
    "attention_inputs": "pi",
    "mlp_block": "pi",
    "mlp_block_backward": "pi",
    "dequantize_codebook": "bbbbbbbnnii",
    "dequantize_codebook_panel": "bbbbbbbnnnnnnnii",
    "quantize_codebook": "bbbbnnii",
    "search_codebook": "bbbbnnii",
    "path": "",
    "set_path": "p",
    "keep_freed_memory": "",
    "use_huge_pages": "",
    "use_gomp": "p",
    "scratch": "np",
    "cross_entropy": "bbbnnfiii",
    "function": "bbni",
    "gated_activation": "bbbniii",
    "gated_activation_backward": "bbbbbniii",
    "rms_norm": "bbbnnffiii",
    "rms_norm_backward": "bbbbbnnffiii",
    "rms_norm_backward_weight": "bbbnnfiii",
    "rotary": "sbbbnnnnnnnnniiii",
    "dequantize_gguf": "bbnniii",
    "quantize_gguf": "bbbnniii",
    "linear_codebook": "pbbbnii",
    "linear_codebook_backward": "pbbnii",
    "multiply": "pnbbnnfii",
    "merge_histogram": "bibinnb",
    "merge_between": "bibinnnbb",
    "merge_keep_top": "bibinnbib",
    "merge_keep_random": "nnnnnb",
    "merge_keep_by_rank": "bibinnbnnnb",
    "merge_absolute_sums": "bibibnb",
    "merge_non_finite": "binb",
    "merge_weighted_sum": "bbnnbi",
    "merge_task_sum": "bibbnnbibi",
    "merge_gram": "bnbinb",
    "nest_scales": "bbbbbni",
    "decode_scales": "bbbbbni",
    "quantize_symmetric": "bbbnniii",
    "dequantize_int8": "bbbbbbnnii",
    "abi": "",
}
RETURNS = {"path": "p", "abi": "p", "use_huge_pages": "v", "use_gomp": "v"}  # others: an int, 0 or an error

ERRORS = {
    "kBadSize": "a size is negative or overflows",
    "kBufferTooSmall": "a buffer is too small for the sizes",
    "kBadBlockSize": "the block size is not allowed",
    "kNullPointer": "a buffer is missing",
    "kBadDtype": "the dtype is not float32, float16 or bfloat16",
    "kBadPath": "this CPU has no such path",
    "kBadArgument": "an argument is out of range",
    "kNoMemory": "there is no memory for scratch",
}
# The numbers that both sides must mean the same by, in the C++ names; Python reads them here and nowhere else.
CONSTANTS = {
    "kFloat32": 0,
    "kFloat16": 1,
    "kBfloat16": 2,
    "kOk": 0,
    "kBadSize": -1,
    "kBufferTooSmall": -2,
    "kBadBlockSize": -3,
    "kNullPointer": -4,
    "kBadDtype": -5,
    "kBadPath": -6,
    "kBadArgument": -7,
    "kNoMemory": -8,
    "kSilu": 0,
    "kGelu": 1,
    "kGeluTanh": 2,
    "kExp": 0,
    "kTanh": 1,
    "kNormalCumulative": 2,
    "kScaleGroup": 256,
    "kStrip": 16,
    "kStep": 32,
    "kMaxPlainWidth": 1024,
    "kMaxTokens": 16,
    "kMaxPackedTokens": 4,
    "kSumLanes": 8,
    "kUpperBins": 32768,
    "kLowerBins": 65536,
    "SourceKind::dense": 0,
    "SourceKind::codebook4": 1,
    "SourceKind::gguf": 3,
    "SourceKind::int8": 4,
}

_WORDS: dict[type, str] = {_ADDRESS: "p", _INT: "i", _LONG: "n", _FLOAT: "f"}
_LETTERS = {"b": "pn", "s": "pn"}


def text() -> str:
    """A line for every structure, function and constant, as csrc/abi/abi.cpp writes them."""
    functions = (
        f"{name} {''.join(_LETTERS.get(letter, letter) for letter in letters)}>{RETURNS.get(name, 'i')}"
        for name, letters in FUNCTIONS.items()
    )
    constants = (f"{name} {value}" for name, value in CONSTANTS.items())
    return "\n".join((*map(_structure, STRUCTURES), *functions, *constants))


def constants(*names: str) -> tuple[int, ...]:
    """The values of constants by their C++ names."""
    return tuple(CONSTANTS[name] for name in names)


def error_sentence(code: int) -> str:
    """What a function's code says is wrong."""
    return next(
        (ERRORS[name] for name, value in CONSTANTS.items() if value == code and name in ERRORS), f"error {code}"
    )


def _structure(kind: type[ctypes.Structure]) -> str:
    return f"struct {kind.__name__} {ctypes.sizeof(kind)} {' '.join(_fields(kind))}"


def _fields(kind: type[ctypes.Structure]) -> Iterator[str]:
    for name, of in cast(Fields, kind._fields_):
        yield f"{name}:{_word(of)}@{getattr(kind, name).offset}"


def _word(of: type) -> str:
    if issubclass(of, ctypes.Array):
        return f"{_word(cast(type, of._type_))}*{of._length_}"
    return _WORDS.get(of, of.__name__)
