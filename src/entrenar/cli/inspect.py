"""`entrenar inspect`: list what a model file holds."""

from typing import Annotated, Any

import typer

from entrenar.cli.numbers import human_bytes


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A .gguf or .safetensors file, a model or an adapter.")],
) -> None:
    """List tensors, types, shapes, sizes and metadata of safetensors, GGUF and adapters."""
    from entrenar.recipes.inspect import inspect as run

    found = run(path)
    typer.echo(
        f"{path}: {found.kind}, {len(found.tensors)} tensors, {human_bytes(sum(t.bytes for t in found.tensors))}"
    )
    for key, value in found.metadata.items():
        typer.echo(f"  {key} = {_short(value)}")
    for place, bits in found.bits_per_weight().items():
        typer.echo(f"  {bits:6.3f} bits per weight: {place}")
    width = max((len(tensor.name) for tensor in found.tensors), default=0)
    for tensor in found.tensors:
        shape = " × ".join(map(str, tensor.shape))
        typer.echo(f"  {tensor.name:<{width}}  {tensor.type:<9} {shape:<16} {human_bytes(tensor.bytes):>9}")


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(repr, value[:4]))}, … {len(value)} in all]"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
