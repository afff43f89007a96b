"""Which type each tensor of a GGUF gets: llama.cpp's mixtures (its `llama_tensor_get_type`), and its fallbacks.

A mixture spends more bits where an error hurts most: the output head, attention's values, and the last product of the
MLP in the first and last eighth of the layers and every third in between. A K type needs rows of whole super-blocks of
256; a matrix without gets the next larger type with blocks of 32.
"""

import re
from dataclasses import dataclass

import gguf

from entrenar.ops.linear.gguf import block_of

_FILE = gguf.LlamaFileType


@dataclass(frozen=True)
class FileType:
    """What `--type` names: the type of most matrices, and llama.cpp's number for the mixture."""

    name: str
    most: str
    number: int


FILE_TYPES = {
    row.name: row
    for row in (
        FileType("f16", "f16", _FILE.MOSTLY_F16), FileType("f32", "f32", _FILE.ALL_F32),
        FileType("bf16", "bf16", _FILE.MOSTLY_BF16), FileType("q8_0", "q8_0", _FILE.MOSTLY_Q8_0),
        FileType("q6_k", "q6_k", _FILE.MOSTLY_Q6_K), FileType("q5_k_m", "q5_k", _FILE.MOSTLY_Q5_K_M),
        FileType("q5_k_s", "q5_k", _FILE.MOSTLY_Q5_K_S), FileType("q4_k_m", "q4_k", _FILE.MOSTLY_Q4_K_M),
        FileType("q4_k_s", "q4_k", _FILE.MOSTLY_Q4_K_S), FileType("q5_1", "q5_1", _FILE.MOSTLY_Q5_1),
        FileType("q5_0", "q5_0", _FILE.MOSTLY_Q5_0), FileType("q4_1", "q4_1", _FILE.MOSTLY_Q4_1),
        FileType("q4_0", "q4_0", _FILE.MOSTLY_Q4_0),
    )
}  # fmt: skip
_PLAIN = ("f32", "f16", "bf16")
_SMALLER_BLOCKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Model:
    """What the choice depends on beside a tensor's own name and shape."""

    layers: int
    heads: int
    kv_heads: int
    tied: bool


def type_of(name: str, shape: tuple[int, ...], file_type: FileType, model: Model) -> str:
    """The type of the tensor `name` (GGUF's) of `shape` (..., columns) in a file of `file_type`."""
    if len(shape) == 1:
        return "f32"
    if file_type.most in _PLAIN:
        return file_type.most
    return _that_fits(_wanted(name, shape[-1], file_type, model), shape[-1])


def _wanted(name: str, columns: int, file_type: FileType, model: Model) -> str:
    most = file_type.most
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        return "q8_0" if columns % 256 or most == "q8_0" else "q6_k"
    match = _LAYER.fullmatch(name)
    if match is None:
        return most
    layer, part = int(match[1]), match[2]
    medium, small = file_type.name in ("q4_k_m", "q5_k_m"), file_type.name == "q4_k_s"
    values = part in ("attn_v", "attn_qkv")  # alone, or fused with queries and keys
    if (values or part == "ffn_down") and medium and _more_bits(layer, model.layers):
        return "q6_k"
    if values:
        if small and layer < 4:
            return "q5_k"
        # Llama 2 70B shares each of its few values among eight heads.
        return "q5_k" if most == "q4_k" and model.layers == 80 and model.heads != model.kv_heads else most
    if part == "ffn_down" and small and layer < model.layers // 8:
        return "q5_k"
    return most


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _that_fits(type: str, columns: int) -> str:
    """The type itself if rows of `columns` are whole blocks of it, else the next larger one, in the end f16."""
    if columns % block_of(type)[0] and type in _SMALLER_BLOCKS:
        type = _SMALLER_BLOCKS[type]
    return "f16" if columns % block_of(type)[0] else type
