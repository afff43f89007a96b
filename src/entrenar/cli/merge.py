"""`entrenar merge`: combine several models into one."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from entrenar.cli.numbers import human_bytes, human_seconds
from entrenar.core.errors import InputError
from entrenar.core.terminal import printable, write_line

if TYPE_CHECKING:
    from entrenar.merging.plan import PlannedTensor
    from entrenar.merging.report import MergeReport
    from entrenar.recipes.merge import MergeOutlook


def merge(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config, in mergekit's words.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="New directory, or a file for gguf.")],
    to: Annotated[str, typer.Option(help="safetensors (a Hugging Face directory) or gguf (one file).")] = "safetensors",
    type: Annotated[
        str | None,
        typer.Option(help="safetensors: nf4; gguf: as for export [default: the config's dtype; gguf: f16]."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Read headers only, say what would be done.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random masks of dare and della.")] = 0,
    shard_size: Annotated[float, typer.Option(help="Most GB in one file.", min=0.001)] = 5.0,
) -> None:
    """Merge models; a merge that was stopped goes on when the same command runs again."""
    if Path(output).suffix in (".yaml", ".yml") and Path(output).is_file():
        raise InputError(f"{output} is a config and stands where the output's name belongs: merge CONFIG OUT")
    # Importing torch creates a million objects and no garbage. Without the garbage collector it takes 0.1 s less.
    gc.disable()
    from entrenar.recipes.merge import merge as run

    gc.freeze()  # later collections leave these objects out
    gc.enable()
    max_shard_bytes = int(shard_size * 1e9)
    if plan:
        _show_plan(run.plan(config, output, to=to, type=type, max_shard_bytes=max_shard_bytes))
        return
    last = 0

    def progress(done: int, size: int) -> None:
        nonlocal last
        tenth = done * 10 // max(size, 1)
        if tenth > last:
            last = tenth
            _say(f"{human_bytes(done)} of {human_bytes(size)}")

    _show_report(run(config, output, to=to, type=type, seed=seed, max_shard_bytes=max_shard_bytes, progress=progress))
    _say(f"wrote {output}")


def _show_plan(outlook: "MergeOutlook") -> None:
    for tensor in outlook.tensors:
        shape = " × ".join(map(str, tensor.shape))
        _say(f"  {tensor.name}  {shape}  {str(tensor.dtype).removeprefix('torch.')}  {_inputs(tensor)}")
    _say(
        f"{outlook.method}: {len(outlook.tensors)} tensors from {human_bytes(outlook.input_bytes)} into "
        f"{human_bytes(outlook.output_bytes)} in {outlook.files} file{'s' if outlook.files > 1 else ''}; "
        f"about {human_bytes(outlook.memory_bytes)} of memory beside the libraries, about "
        f"{human_seconds(outlook.seconds)}{_then(outlook)}; nothing was written"
    )


def _then(outlook: "MergeOutlook") -> str:
    return f"; then exported as {outlook.exported_as}, the merged files removed" if outlook.exported_as else ""


def _inputs(tensor: "PlannedTensor") -> str:
    per_model = {name: values for name, values in tensor.options.items() if isinstance(values, tuple)}
    models = [
        f"{label}({', '.join(f'{name} {values[index]}' for name, values in per_model.items())})" if per_model else label
        for index, label in enumerate(tensor.labels)
    ]
    shared = [f"{name} {value}" for name, value in tensor.options.items() if name not in per_model]
    return "; ".join([" + ".join(models), *shared])


def _show_report(report: "MergeReport") -> None:
    _say(f"cosine and norm of the result's {report.of} against each parent's (from a sample):")
    for row in report.kinds:
        told = "  ".join(f"{_number(parent.cosine)} {_number(parent.norm_ratio)}" for parent in row.parents)
        _say(f"  {row.kind:<48} {row.tensors:>4}  {told}")
    for remark in report.remarks:
        _say(f"note: {remark}")


def _say(text: str) -> None:
    """A line in which names from files are shown, never obeyed."""
    write_line(printable(text))


def _number(value: float | None) -> str:
    return "    –" if value is None else f"{value:5.2f}"
