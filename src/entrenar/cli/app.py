"""The verbs, and how their arguments are read; nothing here or in the verbs' files imports torch before a verb runs."""

from typing import Annotated

import typer

from entrenar import __version__
from entrenar.cli import check, evaluate, export, generate, init, inspect, merge, train
from entrenar.core.errors import InputError
from entrenar.core.terminal import write_line

app = typer.Typer(
    name="entrenar",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import torch  # only here: `--help` shall not wait for it

        from entrenar import native

        write_line(f"entrenar {__version__}, kernels: {native.path()}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def entrenar(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions and kernels, and exit."),
    ] = False,
) -> None:
    """Fine-tune a language model with 4-bit QLoRA on one machine, fuse it and ship it."""


app.command("init")(init.init)
# `--optimizer.lr=1e-4` is an override written as an option: it reaches core.config.parse_override.
_OVERRIDES = {"ignore_unknown_options": True}
app.command("check", context_settings=_OVERRIDES)(check.check)
app.command("train", context_settings=_OVERRIDES)(train.train)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; what a verb raises comes through as it is.

    Typer's own `main` is not used: it turns Ctrl-C into an exit code without a word.

    Raises:
        InputError: arguments that are not the verb's.
    """
    for argument in arguments:
        if any("\ud800" <= char <= "\udfff" for char in argument):
            raise InputError(f"the argument {argument} is not text in this terminal's encoding: set LC_ALL=C.UTF-8")
    command = typer.main.get_command(app)
    try:
        with command.make_context("entrenar", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        told = getattr(error, "format_message", None)  # of typer's usage errors, whatever class they have there
        if told is None:
            raise
        where = getattr(error, "ctx", None)
        verb = where.command_path if where is not None else "entrenar"
        raise InputError(f"{told().replace('Value error, ', '').rstrip('.')}: see `{verb} --help`") from None
    return 0
