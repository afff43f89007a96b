"""Arguments that several verbs share."""

from enum import StrEnum
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


class Dtype(StrEnum):
    """Number types that a model computes in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class TooLong(StrEnum):
    """What becomes of a row that is too long."""

    ERROR = "error"
    TRUNCATE = "truncate"
    DROP = "drop"


DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype", case_sensitive=False, help="Computes in; auto: bfloat16 where the machine has it natively."
    ),
]
