"""`entrenar inspect`: list what a model file holds."""

from typing import Annotated, Any

import typer

from entrenar.cli.numbers import human_bytes
from entrenar.core.terminal import printable, write_line

_LONGEST = 100  # characters of a value
_WIDEST = 100  # of the column of names


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A .gguf or .safetensors file, a model or an adapter.")],
) -> None:
    """List tensors, types, shapes, sizes and metadata of safetensors, GGUF and adapters."""
    from entrenar.recipes.inputs import check_inspected

    check_inspected(path)  # before seconds of imports
    from entrenar.recipes.inspect import inspect as run

    listing_of_file = run(path)
    size = human_bytes(sum(tensor.bytes for tensor in listing_of_file.tensors))
    write_line(f"{printable(path)}: {listing_of_file.kind}, {len(listing_of_file.tensors)} tensors, {size}")
    for key, value in listing_of_file.metadata.items():
        write_line(f"  {printable(key)} = {_short(value)}")
    for place, bits in listing_of_file.bits_per_weight().items():
        write_line(f"  {bits:6.3f} bits per weight: {place}")
    names = [printable(tensor.name) for tensor in listing_of_file.tensors]
    width = min(max(map(len, names), default=0), _WIDEST)
    for name, tensor in zip(names, listing_of_file.tensors, strict=True):
        shape = " × ".join(map(str, tensor.shape))
        write_line(f"  {name:<{width}}  {tensor.type:<9} {shape:<16} {human_bytes(tensor.bytes):>9}")


def _short(value: Any) -> str:
    if isinstance(value, list):
        more = f", … {len(value)} in all" if len(value) > 8 else ""
        return f"[{', '.join(map(_short, value[:4] if more else value))}{more}]"
    # A long text is cut before it is looked at: a file may hold megabytes in one value.
    text = printable(repr(value[:_LONGEST] if isinstance(value, str | bytes) else value))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}…"
