"""Export: fuse a model with its adapter and write it for another tool."""

from pathlib import Path

import torch

from entrenar.core.atomic import refuse_existing
from entrenar.core.errors import InputError
from entrenar.exporting.gguf import export_gguf
from entrenar.exporting.huggingface import export_huggingface
from entrenar.recipes.open_model import open_model

_SAFETENSORS_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_TYPES = {"safetensors": ("bf16", "f32", "f16"), "gguf": ("f16", "f32", "bf16", "q8_0")}


def export(
    model: str,
    output: str | Path,
    *,
    adapter: str | None = None,
    to: str = "safetensors",
    type: str | None = None,
    quantize: str | None = None,
) -> Path:
    """Write `model`, fused with `adapter`, as a new file or directory.

    Args:
        to: "safetensors" (a Hugging Face directory) or "gguf" (one file). type: of the weights; the first listed in
            the error for a wrong one is the default. quantize: see `open_model`.

    Raises:
        InputError: an unknown kind or type, a taken output, or a model that cannot be written so.
    """
    output = Path(output)
    if to not in _TYPES:
        raise InputError(f"cannot export to {to!r}: choose {' or '.join(_TYPES)}")
    type = type or _TYPES[to][0]
    if type not in _TYPES[to]:
        raise InputError(f"{to} has no type {type!r} here: choose {', '.join(_TYPES[to])}")
    refuse_existing(output)
    # The base is fused in float32 arithmetic; unquantized tensors are read as they are.
    loaded, tokenizer = open_model(model, adapter, quantize, dtype="float32")
    if to == "gguf":
        export_gguf(loaded, tokenizer, output, type)  # pyright: ignore[reportArgumentType] - checked above
    else:
        export_huggingface(loaded, tokenizer, output, _SAFETENSORS_TYPES[type])
    return output
