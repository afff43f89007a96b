"""The process that renders chat templates; `data/template.py` starts it and speaks with it over its pipes.

A template is a program that comes with a model, so from anybody. Jinja's sandbox keeps it from files and from Python,
but not from loops without end or strings without bound, and neither can be stopped from within a process while C code
runs. Here both are bounded by the kernel: processor seconds by a timer whose signal ends this process, bytes by
RLIMIT_AS.

One JSON request a line: `template` (a number), `source` (with a number's first request), `variables`, `day`, and
`prefixes`: how many of the messages to render, and whether an answer comes next, any number of times. One JSON answer a
line: for each of them `text` and `clock` (whether the template asked for the date), or `error`. The functions that a
template finds are those of transformers' `render_jinja_template`. Only Jinja is imported.
"""

import contextlib
import json
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MOST_ERROR = 300  # characters of an error that are shown


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says; what is trained is found without it, so it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace without names that reach into Python, as transformers has it."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        for name in dict(*rest, **values):
            _refuse_private(name)
        Namespace.__init__(self, *rest, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name such as {name!r}")


class Renderer:
    """Compiled templates by number, and the day that they are told it is."""

    def __init__(self) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = self._strftime_now
        environment.globals["dict"] = lambda *args, **values: dict(*args, **values)
        environment.globals["namespace"] = _Namespace
        del environment.globals["lipsum"]  # words by chance
        self.environment, self.sources, self.templates = environment, {}, {}
        self.day, self.clock = datetime.min, False

    def answers(self, request: dict[str, Any], seconds: float, most_characters: int) -> list[dict[str, Any]]:
        """Render every prefix; every mistake of the template becomes an `error`."""
        self.day, variables = datetime.fromisoformat(request["day"]), request["variables"]
        answers = list[dict[str, Any]]()
        for count, answer_next in request["prefixes"]:
            prefix = {"messages": variables["messages"][:count], "add_generation_prompt": answer_next}
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answers.append(self._answer(request, variables | prefix, most_characters))
            signal.setitimer(signal.ITIMER_PROF, 0)
        return answers

    def _answer(self, request: dict[str, Any], variables: dict[str, Any], most_characters: int) -> dict[str, Any]:
        self.clock = False
        number = request["template"]
        try:
            if number not in self.templates:
                self.sources.setdefault(number, request.get("source"))
                self.templates[number] = self.environment.from_string(self.sources[number])
            pieces, total = [], 0
            for piece in self.templates[number].generate(**variables):
                total += len(piece)
                if total > most_characters:
                    return {"error": f"it writes more than {most_characters:,} characters"}
                pieces.append(piece)
            return {"text": "".join(pieces), "clock": self.clock}
        except RecursionError:
            return {"error": "it calls itself without end"}
        except MemoryError:
            return {"error": "it needs more memory than a chat template may take"}
        except Exception as error:
            return {"error": _sentence(error)}

    def _strftime_now(self, form: str) -> str:
        self.clock = True
        return self.day.strftime(form)


def _sentence(error: Exception) -> str:
    is_syntax = isinstance(error, jinja2.TemplateSyntaxError)
    text = f"{error.message} at line {error.lineno}" if is_syntax else str(error)
    words = " ".join(text.split()) or type(error).__name__
    return words if len(words) <= _MOST_ERROR else words[:_MOST_ERROR] + "…"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bound(most_bytes: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(seconds: float, most_bytes: int, most_characters: int) -> None:
    """Answer requests until the input ends; a render that takes more processor seconds ends the process."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _bound(most_bytes)
    renderer = Renderer()
    for line in sys.stdin.buffer:
        answers = renderer.answers(json.loads(line), seconds, most_characters)
        sys.stdout.buffer.write(json.dumps(answers).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
