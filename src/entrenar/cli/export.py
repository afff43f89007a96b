"""`entrenar export`: fuse and write for another tool."""

from typing import Annotated

import typer

from entrenar.cli.arguments import AdapterOption, ModelArgument, QuantizeOption
from entrenar.cli.numbers import human_bytes


def export(
    model: ModelArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="New file or directory.")],
    adapter: AdapterOption = None,
    to: Annotated[str, typer.Option(help="safetensors (a Hugging Face directory) or gguf (one file).")] = "safetensors",
    type: Annotated[
        str | None,
        typer.Option(help="safetensors: bf16, f32, f16, nf4; gguf: f16, f32, bf16, q8_0 [default: the first]."),
    ] = None,
    quantize: QuantizeOption = None,
    base: Annotated[
        str | None,
        typer.Option(help="safetensors: dequantized (the model that was trained) or original [default: by type]."),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Write a 4-bit type of a dequantized base, although little survives.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="safetensors: rows to measure loss and KL on.")] = None,
) -> None:
    """Fuse a model with its adapter and write it as a Hugging Face directory or a GGUF file."""
    from entrenar.exporting.fidelity import fidelity_table
    from entrenar.recipes.export import export as run

    path = run(model, output, adapter=adapter, to=to, type=type, quantize=quantize, base=base, lossy=lossy, text=text)
    for line in fidelity_table(path):
        typer.echo(line)
    files = [path] if path.is_file() else sorted(path.iterdir())
    typer.echo(f"wrote {path}: {human_bytes(sum(file.stat().st_size for file in files))}")
