"""Weights that other tools quantized, recognised by their tensors; none of them is read.

What a file holds is told by its names and types, because its config may say nothing (AutoGPTQ, ModelOpt, MLX and early
fp8 files): codes are integers or 8 bits wide and have scales of their own beside them. What is read is told in
prequantized.py; a weight that is merely stored as fp8, without a scale, is a plain number.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.core.errors import InputError
from entrenar.files.prequantized import PREQUANTIZED
from entrenar.files.safetensors import TensorInfo

# No name of safetensors' floats of 16 bits and more begins with these; C64 and BOOL hold no codes either.
_INTEGERS = ("I", "U")
_NARROW = ("F8_", "F6_", "F4")  # F64 is none
_SCALES = ("scale", "zero", "absmax", "codebook", "centroid", "suh", "wscale")


@dataclass(frozen=True)
class _Signature:
    """Tensors of one module by which a tool is known: the last parts of their names, the codes' first.

    `codes`: how the codes' type begins, none: any (HQQ may store them as if they were floats).
    """

    tool: str
    leaves: tuple[str, ...]
    codes: tuple[str, ...] = _INTEGERS


# The first that fits names it, so those with more tensors stand before those with less.
_SIGNATURES = (
    _Signature("gptq", ("qweight", "g_idx", "scales")),
    _Signature("fp_quant", ("qweight", "scales", "forward_hadamard_matrix")),
    _Signature("gptq or awq", ("qweight", "scales")),
    _Signature("gptq (marlin)", ("B", "s")),
    _Signature("compressed-tensors", ("weight_packed", "weight_scale")),
    _Signature("compressed-tensors", ("weight_packed",)),
    _Signature("mlx", ("weight", "scales", "biases"), ("U32", "I32")),
    _Signature("mlx", ("weight", "scales"), ("U32",)),
    _Signature("modelopt nvfp4", ("weight", "weight_scale", "weight_scale_2")),
    _Signature("modelopt fp8", ("weight", "weight_scale", "input_scale"), _NARROW),
    _Signature("fp8 blocks", ("weight", "weight_scale_inv"), _NARROW),
    _Signature("fp8", ("weight", "weight_scale"), _NARROW),
    _Signature("fp8", ("weight", "scale"), _NARROW),
    _Signature("mistral's fp8", ("weight", "qscale_weight"), _NARROW),
    _Signature("eetq", ("weight", "weight_scales"), ("I8",)),
    _Signature("compressed-tensors int8", ("weight", "weight_scale"), ("I8",)),
    _Signature("bitnet", ("weight", "weight_scale"), ("U8",)),
    _Signature("hqq", ("W_q", "scale"), ()),
    _Signature("hqq", ("W_q", "meta"), ()),
    _Signature("torchao", ("_weight_qdata", "_weight_scale"), ()),
    _Signature("torchao", ("_weight_qdata",), ()),
    _Signature("torchao", ("weight_qdata", "weight_scale"), ()),
    _Signature("quanto", ("_data", "_scale"), (*_INTEGERS, *_NARROW)),
    _Signature("exl2", ("q_weight", "q_scale")),
    _Signature("exl3", ("trellis", "suh", "svh")),
    _Signature("aqlm", ("codes", "codebooks", "scales")),
    _Signature("quip", ("Qidxs", "SU", "SV")),
    _Signature("vptq", ("indices", "centroids")),
    _Signature("spqr", ("dense_weights", "row_offsets")),
    _Signature("higgs", ("weight", "scales", "tables")),
)


def refuse_foreign(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """InputError if the weights of a directory were quantized in a way that is not read.

    Args:
        directory: what the error calls it.
        config: the content of its config.json (which may or may not say that it is quantized, and as what).
        tensors: every tensor of its files (`SafetensorsCheckpoint.tensors`).

    Raises:
        InputError: it names the tool, as the config does or else as its tensors are known to be of, and a tensor. Also
            where the config says that plain numbers are quantized.
    """
    said, names = _said(config), sorted(tensors)
    foreign = next((pair for pair in _quantized(tensors, names) if not _is_read(pair[1], names)), None)
    if foreign is not None:
        tool, name = foreign
        raise InputError(
            f"{directory} is quantized as {said or tool}, which is not read ({name} holds codes, as "
            f"{tensors[name].dtype}): take the original, in 16 or 32 bits"
        )
    if said is not None:
        raise InputError(
            f"{directory} is quantized as {said} by its config.json, but its tensors are plain numbers: take the "
            "original, or take quantization_config out of config.json if they are the weights to use"
        )


def _said(config: Mapping[str, Any]) -> str | None:
    """What the config calls the quantization; None if it says nothing, or a kind that is read."""
    for inside in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            stated = inside.get(key) if isinstance(inside, Mapping) else None
            if isinstance(stated, Mapping) and stated:
                return _method(stated)
    return None


def _method(stated: Mapping[str, Any]) -> str | None:
    method = stated.get("quant_method") or stated.get("quant_algo")
    if not method and "bits" in stated and "group_size" in stated:
        return "mlx"
    if any(kind.describes(stated) for kind in PREQUANTIZED):
        return None
    if method:
        return str(method)[:40]
    return "something that it does not name" if any(stated.values()) else None


def _quantized(tensors: Mapping[str, TensorInfo], names: list[str]) -> Iterator[tuple[str, str]]:
    """Tool and name of every tensor that holds codes; of each module the best known first."""
    for owner, leaves in _modules(tensors).items():
        before = f"{owner}." if owner else ""
        for signature in _SIGNATURES:
            codes = signature.leaves[0]
            if leaves.keys() >= set(signature.leaves) and leaves[codes].dtype.startswith(signature.codes or ("",)):
                yield _awq_or_gptq(signature.tool, leaves), f"{before}{codes}"
        for leaf, info in leaves.items():
            tool = _unknown_tool(f"{before}{leaf}", info, leaves, names)
            if tool is not None:
                yield tool, f"{before}{leaf}"


def _modules(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Module → last part of a name → its tensor."""
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        owner, _, leaf = name.rpartition(".")
        modules[owner][leaf] = info
    return modules


def _unknown_tool(name: str, info: TensorInfo, beside: Iterable[str], names: list[str]) -> str | None:
    """What to call the quantization of a tensor whose type is of codes, or None if it is not of codes."""
    leaf = name.rpartition(".")[2]
    if len(info.shape) < 2 or not info.dtype.startswith(_INTEGERS + _NARROW) or _is_scale(leaf):
        return None
    if leaf.endswith("_blocks") and f"{leaf.removesuffix('_blocks')}_scales" in beside:
        return "mxfp4"
    scaled = any(map(_is_scale, beside)) if leaf == "weight" else False
    scaled = scaled or any(_is_scale(other[len(name) :]) for other in _beginning_with(name, names))
    if info.dtype.startswith("F8"):
        return "fp8" if scaled else None
    return "something that is not known here" if scaled or leaf == "weight" else None


def _is_scale(leaf: str) -> bool:
    return any(word in leaf.lower() for word in _SCALES)


def _awq_or_gptq(tool: str, leaves: Mapping[str, TensorInfo]) -> str:
    """GPTQ packs rows of the transposed weight together, AWQ columns."""
    if tool != "gptq or awq":
        return tool
    return "gptq" if leaves["qweight"].shape[-1:] == leaves["scales"].shape[-1:] else "awq"


def _is_read(name: str, names: list[str]) -> bool:
    """Whether a tensor is a weight of a kind of checkpoint that is read."""
    return any(kind.claims(name, names) for kind in PREQUANTIZED)


def _beginning_with(start: str, names: list[str]) -> list[str]:
    """The names, which are sorted, that begin so."""
    first = bisect_left(names, start)
    end = bisect_left(names, f"{start}\U0010ffff")
    return names[first:end]
