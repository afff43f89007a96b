"""The one reader of every file that we take from elsewhere as text or JSON: bounded, of regular files only, validated.

What is read here may come from anybody: a directory from a hub, a run that was killed, a path typed by mistake. So the
file's kind and size are known before its content is, and its content has the shape that is asked for before it is used.
"""

import os
import stat
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from entrenar.core.errors import InputError

JsonObject = dict[str, Any]
Kind = TypeVar("Kind")

# The largest that is met: tokenizer.json of a vocabulary of 262,000 tokens, 33 MB.
LIMIT = 256 * 2**20
_MAX_PROBLEMS = 3
_MAX_VALUE = 60  # characters of a wrong value that are shown


def open_regular(path: Path, what: str) -> BinaryIO:
    """Open `path` to read bytes; only a regular file (or a link to one) is opened.

    A FIFO would wait for ever and a device such as /dev/zero never ends, so they are refused without being read.

    Raises:
        InputError: there is none, it is something else, or it may not be read. `what` names it: "adapter config".
    """
    try:
        # Without O_NONBLOCK the open itself waits at a FIFO; on a regular file the flag does nothing.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{what} {path} cannot be read: {reason(error)}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(f"{what} {path} is {_kind_of(mode)}, not a file: check the path")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, what: str, limit: int = LIMIT) -> bytes:
    """The whole of a regular file of at most `limit` bytes; see `open_regular`."""
    try:
        with open_regular(path, what) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {reason(error)}") from None
    if len(content) > limit:
        raise InputError(f"{what} {path} is larger than {limit:,} bytes, so it is not a {what}: check the path")
    return content


def read_text(path: Path, what: str, limit: int = LIMIT) -> str:
    """The whole of a regular UTF-8 file, with or without a byte-order mark; see `open_regular`."""
    try:
        return read_bytes(path, what, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path, what: str, kind: type[Kind] = JsonObject) -> Kind:
    """Read a JSON file as a `kind`: `JsonObject` (the default), a type such as `dict[str, str]`, a dataclass (which
    ignores keys it does not know), a pydantic model.

    Raises:
        InputError: see `open_regular`; it is not JSON; or a value is not of the type that `kind` asks for, by its key.
    """
    return parse_json(read_bytes(path, what).removeprefix(b"\xef\xbb\xbf"), f"{what} {path}", kind)


def parse_json(text: str | bytes, source: str, kind: type[Kind] = JsonObject) -> Kind:
    """Parse JSON as a `kind` without converting types ("3" is no number); `source` names it in errors."""
    try:
        return cast(Kind, _adapter(kind).validate_json(text, strict=True))
    except ValidationError as error:
        problems = error.errors()
    shown = "; ".join(_problem(detail) for detail in problems[:_MAX_PROBLEMS])
    more = f" and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
    raise InputError(f"{source}: {shown}{more}")


def reason(error: Exception) -> str:
    """What went wrong, without the path that the system's own text repeats."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@lru_cache(maxsize=64)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _problem(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if detail["type"] == "json_invalid":
        return f"not JSON ({message.removeprefix('invalid JSON: ')}): write or fetch it again"
    key = ".".join(str(step) for step in detail["loc"])
    if detail["type"] == "missing":
        return f"the key '{key}' is missing"
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"the key '{key}' is not known"
    value = repr(detail["input"]) if not isinstance(detail["input"], Mapping) else "an object"
    value = value if len(value) <= _MAX_VALUE else value[:_MAX_VALUE] + "…"
    return f"'{key}' is {value} but {message}" if key else f"it is {value} but {message}"


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def _kind_of(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "something else")
