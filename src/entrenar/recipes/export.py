"""Export: fuse a model with its adapter and write it for another tool."""

from pathlib import Path

from entrenar.core.atomic import refuse_existing
from entrenar.core.errors import InputError
from entrenar.exporting.gguf import export_gguf
from entrenar.exporting.safetensors_output import TYPES
from entrenar.recipes.export_safetensors import export_safetensors
from entrenar.recipes.open_model import open_model

_TYPES = {"safetensors": TYPES, "gguf": ("f16", "f32", "bf16", "q8_0")}


def export(
    model: str,
    output: str | Path,
    *,
    adapter: str | None = None,
    to: str = "safetensors",
    type: str | None = None,
    quantize: str | None = None,
    base: str | None = None,
    lossy: bool = False,
    text: str | None = None,
) -> Path:
    """Write `model`, fused with `adapter`, as a new file or directory.

    Args:
        base, lossy, text: of safetensors, see `export_safetensors`.
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
    if to == "safetensors":
        export_safetensors(
            model, output, adapter=adapter, type=type, quantize=quantize, base=base, lossy=lossy, text=text
        )
        return output
    if base or lossy or text:
        raise InputError(f"base, lossy and text are for safetensors, not for {to}: leave them out")
    # The base is fused in float32 arithmetic; unquantized tensors are read as they are.
    loaded, tokenizer = open_model(model, adapter, quantize, dtype="float32")
    export_gguf(loaded, tokenizer, output, type)  # pyright: ignore[reportArgumentType] - checked above
    return output
