"""`entrenar export`: fuse and write for another tool."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from entrenar.cli.arguments import AdapterOption, ModelArgument, QuantizeOption
from entrenar.cli.numbers import human_bytes
from entrenar.core.terminal import printable, write_line

if TYPE_CHECKING:
    from entrenar.evaluation.fidelity import ExportStep


_Output = Annotated[str, typer.Option("--output", "-o", help="New file or directory.")]
_To = Annotated[
    str | None,
    typer.Option(
        help="safetensors (a Hugging Face directory), gguf (one file) or gguf-adapter (for llama.cpp's --lora) "
        "[default: gguf for an output that ends in .gguf, else safetensors]."
    ),
]
_Type = Annotated[
    str | None,
    typer.Option(
        help="safetensors: bf16, f32, f16, nf4; gguf: f16, f32, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, "
        "q5_1, q5_0, q4_1, q4_0 [default: the first]."
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(help="safetensors: dequantized (the model that was trained) or original [default: by type]."),
]
_Lossy = Annotated[bool, typer.Option("--lossy", help="Write a 4-bit type even where little of the change survives.")]
_Text = Annotated[str | None, typer.Option(help="safetensors: rows to measure loss and KL on.")]
_Ollama = Annotated[
    bool, typer.Option("--ollama", help="An Ollama Modelfile (or NAME.Modelfile) beside the GGUF adapter.")
]
_Verify = Annotated[
    bool | None,
    typer.Option(help="Run a GGUF against the live model: KL and perplexity [default: where there is an adapter]."),
]
_VerifyOn = Annotated[str | None, typer.Option(help="Held-out text to verify a GGUF on, a file.")]
_Calibrate = Annotated[
    str | None,
    typer.Option(help="gguf, K types: text like what the model will see, a file; errors count by their effect on it."),
]


def export(
    model: ModelArgument,
    output: _Output,
    adapter: AdapterOption = None,
    to: _To = None,
    type: _Type = None,
    quantize: QuantizeOption = None,
    base: _Base = None,
    lossy: _Lossy = False,
    text: _Text = None,
    ollama: _Ollama = False,
    verify: _Verify = None,
    verify_on: _VerifyOn = None,
    calibrate: _Calibrate = None,
) -> None:
    """Fuse a model with its adapter and write it as a Hugging Face directory or a GGUF; or write the adapter alone."""
    from pathlib import Path

    from entrenar.recipes.export_request import ExportRequest

    request = ExportRequest(
        model=model, output=Path(output), adapter=adapter, to=to, type=type, quantize=quantize, base=base, lossy=lossy,
        text=text, ollama=ollama, verify_on=verify_on, calibrate_on=calibrate,
    )  # fmt: skip
    wanted = verify if verify is not None else request.kind == "gguf" and bool(adapter or verify_on)
    request = replace(request, verifies=wanted)
    request.checked_type()  # before seconds of imports
    from entrenar.exporting.fidelity import fidelity_table
    from entrenar.recipes.export import run

    path = run(request, on_verified=_show if wanted else None, say=lambda text: write_line(f"note: {printable(text)}"))
    for line in fidelity_table(path):
        write_line(line)
    files = [path] if path.is_file() else sorted(path.iterdir())
    write_line(f"wrote {printable(str(path))}: {human_bytes(sum(file.stat().st_size for file in files))}")


def _show(steps: "list[ExportStep]") -> None:
    for step in steps:
        write_line(f"  {step.step:<10} perplexity {step.perplexity:9.3f}   KL from live {step.kl:.2e}")
