"""Entry point: turns every ending into one sentence and an exit code (0 done, 1 failed, 2 bad input).

It imports next to nothing itself, so that Ctrl-C is answered while everything else is still being imported.
"""

import os
import sys
from typing import Any, NoReturn

from entrenar.core.errors import EntrenarError
from entrenar.core.terminal import plain_streams, printable

# What PyTorch and the system say, in exceptions of their own, when there is no memory left.
_NO_MEMORY = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "out of memory")


def __getattr__(name: str) -> Any:
    """`app`, typer's application, once somebody asks for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from entrenar.cli.app import app

    return app


def main() -> NoReturn:
    """Run the command line and exit."""
    # transformers' own progress bars and advice would bury our sentences; a user's own setting wins.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        plain_streams()
        code = _run()
    except KeyboardInterrupt:
        code = _tell("stopped by Ctrl-C")
    sys.exit(code)


def _run() -> int:
    try:
        from entrenar.cli.app import run

        code = run(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has read enough
        _drop_output()
        return 1
    except EntrenarError as error:
        for line in str(error).splitlines():
            _tell(line)
        return error.exit_code
    except MemoryError:
        return _tell(_out_of_memory())
    except RecursionError:
        return _tell("something nests too deep to be read: check the files that were named")
    except UnicodeEncodeError as error:  # a name, where the system's own encoding is not UTF-8
        return _tell(f"{error.object[:200]!r} has no form in {error.encoding}: set LC_ALL=C.UTF-8, or another name")
    except OSError as error:
        _drop_output()  # the error may be the output's own, which would come again at exit
        return _tell(_sentence(error))
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        return _tell(_out_of_memory())
    return code


def _tell(text: str) -> int:
    """Print one error line; the exit code of what failed."""
    if sys.stderr is not None:
        print(f"error: {printable(text)}", file=sys.stderr)  # noqa: T201 - the command's own output
    return 1


def _sentence(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f" ({' and '.join(names)})" if names else ""
    return f"the system refused: {error.strerror or error}{where}; nothing half-written was left under a final name"


def _out_of_memory() -> str:
    return "out of memory: close other programs, or choose a smaller model, batch or max_length"


def _drop_output() -> None:
    """Let nothing more be written to standard output."""
    if sys.stdout is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
