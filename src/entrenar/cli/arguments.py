"""Arguments that several verbs share."""

from typing import Annotated

import typer

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config; `entrenar init` writes one.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override config keys, e.g. optimizer.lr=1e-4.")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory or id, or a .gguf file.")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="PEFT adapter directory to lay over the model.")]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="Base: nf4, fp4, int4, int8, none, keep [default: as the adapter says, or keep for a .gguf].",
    ),
]
