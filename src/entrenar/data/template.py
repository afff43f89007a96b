"""A model's chat template, rendered on a fixed day, in bounded time and size.

Rendering happens in a process of its own (`data/template_worker.py`): there a template that never ends or never has
enough is stopped, whatever it does. The text is that of transformers' `apply_chat_template`, to the character.
"""

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError

Turn = dict[str, Any]

# Real templates take a millisecond and some kilobytes a row; the limits are for those that never end.
SECONDS = 3.0
MOST_BYTES = 2**30
MOST_CHARACTERS = 2**24
_ENDLESS = f"it takes more than {SECONDS:.0f} seconds or more memory than a chat template may take"
# Names that a turn's reasoning has been given; templates find it under each (as in transformers).
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass
class ChatTemplate:
    """The template of a tokenizer on a `day`; `reads_clock`: whether a render so far has asked which day it is.

    `in_parts`: give content as a list of one part, as templates of models that see images want it. `ends`: the model's
    own ends of generation (`generation_config.eos_token_id`: a number, a list or None). `options`: variables that it is
    given beside those of a row.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    day: date = field(default_factory=date.today)
    reads_clock: bool = False
    in_parts: bool = False
    ends: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def reads(self, key: str, tools: Sequence[Any] = ()) -> bool:
        """Whether the template names `key`, as a variable or a key; a part of another name is none."""
        return re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", self.source(tools)) is not None

    def source(self, tools: Sequence[Any] = ()) -> str:
        """The template's text.

        Raises:
            InputError: the tokenizer has none, or several and none to choose.
        """
        if not self.tokenizer.chat_template:
            raise InputError(
                "this model's tokenizer has no chat template, so it cannot be trained on conversations: use rows with "
                "`text`, or an instruct model"
            )
        try:
            source = self.tokenizer.get_chat_template(tools=list(tools) or None)
        except ValueError as error:
            raise InputError(f"the model's chat template cannot be chosen: {error}") from None
        if not isinstance(source, str):
            raise InputError(f"the model's chat template is a {type(source).__name__}, not text")
        return source

    def render(
        self,
        turns: Sequence[Turn],
        *,
        answer_next: bool = False,
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; `answer_next` opens an assistant turn at the end; `options`: more variables.

        Raises:
            InputError: the template refuses the conversation, fails, or takes too much time or memory.
        """
        text = self.render_prefixes(turns, [(len(turns), answer_next)], tools=tools, options=options)[0]
        if isinstance(text, InputError):
            raise text
        return text

    def render_prefixes(
        self,
        turns: Sequence[Turn],
        prefixes: Sequence[tuple[int, bool]],
        *,
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> list[str | InputError]:
        """Of each (number of turns, whether an answer comes next) the text, or why there is none: one question to the
        process that renders."""
        variables = {
            **_special_tokens(self.tokenizer),
            **self.options,
            **(options or {}),
            "messages": [_as_served(turn, self.in_parts) for turn in turns],
            "tools": list(tools) or None,
            "documents": None,
        }
        answers = _WORKER.ask(self.source(tools), variables, self.day, prefixes)
        self.reads_clock |= any(answer.get("clock", False) for answer in answers)
        return [
            InputError(f"the model's chat template refuses this conversation: {answer['error']}")
            if "error" in answer
            else answer["text"]
            for answer in answers
        ]


def _as_served(turn: Turn, in_parts: bool) -> Turn:
    """Without what is null, and with the reasoning under every name that a template may read, as transformers does."""
    given = {key: value for key, value in turn.items() if value is not None}
    if in_parts and isinstance(given.get("content"), str):
        given["content"] = [{"type": "text", "text": given["content"]}]
    reasoning = next((given[key] for key in REASONING_KEYS if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, list)}


class _Worker:
    """The rendering process: started at the first render, anew after one that had to be stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, int] = {}
        self._endless: set[str] = set()

    def ask(
        self, source: str, variables: dict[str, Any], day: date, prefixes: Sequence[tuple[int, bool]]
    ) -> list[dict[str, Any]]:
        """Of every prefix (see data/template_worker.py) `text` and `clock`, or `error`."""
        with self._lock:
            if source in self._endless:  # it would only take its time again
                return [{"error": _ENDLESS}] * len(prefixes)
            process = self._running()
            request: dict[str, Any] = {"variables": variables, "day": day.isoformat(), "prefixes": prefixes}
            if source not in self._known:
                self._known[source] = len(self._known)
                request["source"] = source
            request["template"] = self._known[source]
            try:
                answers = self._exchange(process, request)
                if any(answer.get("error") == _ENDLESS for answer in answers):
                    self._endless.add(source)
                return answers
            except BaseException:  # an interrupt too: a half-read answer must not be taken for the next one's
                self._stop()
                raise

    def _exchange(self, process: subprocess.Popen[bytes], request: dict[str, Any]) -> list[dict[str, Any]]:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the model's chat template cannot be given this conversation: {error}") from None
        if not line:
            self._stop()
            return [{"error": _ENDLESS}] * len(request["prefixes"])
        return [_as_text(answer) for answer in json.loads(line)]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            limits = map(str, (SECONDS, MOST_BYTES, MOST_CHARACTERS))
            # A session of its own: Ctrl-C is for us, and it ends when our end of the pipe closes.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "entrenar.data.template_worker", *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return self._process

    def _stop(self) -> None:
        process, self._process, self._known = self._process, None, {}
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                _close(pipe)
        process.wait()

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop()


def _as_text(answer: dict[str, Any]) -> dict[str, Any]:
    if not answer.get("text", "").isascii() and _has_half_pair(answer["text"]):
        return {"error": "it writes half of a surrogate pair, which is no text"}
    return answer


def _close(pipe: Any) -> None:
    with contextlib.suppress(OSError):  # what was still to be written to a process that has gone
        pipe.close()


def _has_half_pair(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


_WORKER = _Worker()
atexit.register(_WORKER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WORKER.__init__)  # the pipes are the parent's: two must not ask one process
