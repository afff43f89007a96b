"""Entry point: registers the verbs and turns errors into one sentence and an exit code (0 done, 1 failed, 2 bad input).

Nothing here or in the verbs' files imports torch before a verb runs, so that `--help` is instant.
"""

import os
import sys
from typing import NoReturn

import typer

from entrenar.cli import check, evaluate, export, generate, init, inspect, merge, train
from entrenar.core.errors import EntrenarError

_OVERRIDES = {"ignore_unknown_options": True}

app = typer.Typer(
    name="entrenar",
    help="Fine-tune a language model with 4-bit QLoRA on one machine, fuse it and ship it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("init")(init.init)
# `--optimizer.lr=1e-4` is an override written as an option: it reaches core.config.parse_override.
app.command("check", context_settings=_OVERRIDES)(check.check)
app.command("train", context_settings=_OVERRIDES)(train.train)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)

_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt, without a word


def main() -> NoReturn:
    """Run the command line and exit."""
    # transformers' own progress bars and advice would bury our sentences; a user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except EntrenarError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)  # noqa: T201 - the command's own output
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except SystemExit as stop:
        if stop.code != _INTERRUPTED:
            raise
        print("error: stopped by Ctrl-C", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    sys.exit(0)
