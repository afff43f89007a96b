"""Strict YAML configs: unknown keys, wrong types and bad values are all reported at once, each with its line.

`load_config` reads a YAML file into a typed `Section` tree. YAML 1.1 reads `2e-4` as a string; here it is a number.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from entrenar.core.documents import read_text
from entrenar.core.errors import InputError


class Section(BaseModel):
    """One section of a config: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


ConfigType = TypeVar("ConfigType", bound=Section)
KeyPath = tuple[str, ...]
_MAX_BYTES, _MAX_VALUES = 16 * 2**20, 200_000
_MAX_SHOWN = 100  # characters of a key or a wrong value
_OVERRIDE = -1  # in place of a line number: the key was given beside the file


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats follow YAML 1.2 (`2e-4` and `1.e5` are numbers) and whose errors are all YAMLErrors."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML lets Python's own errors through for `0x_`, `!!int ''` or the 31st of February."""
        try:
            return super().construct_object(node, deep=deep)  # pyright: ignore[reportUnknownMemberType]
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
            raise yaml.constructor.ConstructorError(
                None, None, f"a value that cannot be read as its type ({error})", node.start_mark
            ) from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts into quotes what the loader would read as a number: a path such as `0e0`."""


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {k: list(v) for k, v in _kind.yaml_implicit_resolvers.items()}
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def load_config(kind: type[ConfigType], path: Path, overrides: Mapping[str, Any] | None = None) -> ConfigType:
    """Read `path` as a `kind`, with `overrides` (dotted key → value) laid over it.

    Raises InputError that lists every problem with file, line, key, what is allowed and, for a misspelt key, the
    nearest known one.
    """
    values, lines = _overridden(path, overrides)
    return validate(kind, values, str(path), lines)


def load_values(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The same values as they stand there, unchecked; InputError for a file that is no YAML mapping."""
    return _overridden(path, overrides)[0]


def _overridden(path: Path, overrides: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    values, lines = _read_yaml(path)
    for dotted, value in (overrides or {}).items():
        _set(values, dotted, value)
        lines[tuple(dotted.split("."))] = _OVERRIDE
    return values, lines


def validate(kind: type[ConfigType], values: Any, source: str, lines: Mapping[KeyPath, int]) -> ConfigType:
    """Check parsed `values` against `kind`; see `load_config`."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [_sentence(kind, detail, source, lines) for detail in error.errors()]
    raise InputError("\n".join(dict.fromkeys(problems)))


def parse_override(text: str) -> tuple[str, Any]:
    """Split `a.b=value` from a command line; the value is read as YAML."""
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise InputError(
            f"cannot read the override {_shown(text)}: write it as section.key=value, e.g. optimizer.lr=1e-4"
        )
    value_of, _ = _parse(value, f"the value in the override {_shown(text)}")
    return key, value_of


def to_yaml(config: Section) -> str:
    """Write a resolved config as YAML, keys in their declared order."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    if not os.path.lexists(path):
        raise InputError(f"config file {path} does not exist: check the path, or run `entrenar init` for one")
    values, lines = _parse(read_text(path, "config file", _MAX_BYTES), f"config file {path}", path)
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must be a mapping of sections (model, data, …); run `entrenar init`")
    return values, lines


def _parse(text: str, source: str, path: Path | None = None) -> tuple[Any, dict[KeyPath, int]]:
    """The value of a YAML text and the line of every key in it; `source` names it in errors, `path` beside a line."""
    lines: dict[KeyPath, int] = {}
    try:
        node = yaml.compose(text, _Loader)
        if node is not None:
            _walk(node, (), lines, path or Path(source))
        return yaml.load(text, _Loader), lines  # a SafeLoader with one more float pattern
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not YAML: {_one_line(error)}") from error
    except RecursionError:
        raise InputError(
            f"{source} nests without end: an alias (*name) stands inside its own value, or lists in lists in lists"
        ) from None


def _one_line(error: yaml.YAMLError) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text if len(text) <= 5 * _MAX_SHOWN else f"{text[: 5 * _MAX_SHOWN]}…"


def _walk(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], source: Path) -> None:
    """Record the line of every key and list entry below `node`; a key written twice is an error.

    An alias is walked as often as it is used, as it would be written out; so a few lines of aliases of aliases that
    stand for millions of values are refused here, before anything is built of them.
    """
    if len(lines) > _MAX_VALUES:
        raise InputError(
            f"{source} holds more than {_MAX_VALUES:,} values, aliases (*name) written out: it is no config"
        )
    if isinstance(node, yaml.SequenceNode):
        for index, entry in enumerate(node.value):
            lines[(*path, str(index))] = entry.start_mark.line + 1
            _walk(entry, (*path, str(index)), lines, source)
        return
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        line = key.start_mark.line + 1
        if here in lines:
            raise InputError(
                f"{source}:{line}: key '{_cut('.'.join(here))}' is written twice (first on line {lines[here]}): "
                "keep one"
            )
        lines[here] = line
        _walk(value, here, lines, source)


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = values.get(parent)
        values[parent] = child = dict(child) if isinstance(child, dict) else {}
        values = child
    values[last] = value


def _sentence(kind: type[Section], detail: ErrorDetails, source: str, lines: Mapping[KeyPath, int]) -> str:
    """Turn one pydantic error into `file:line: sentence`."""
    location = _key_path(kind, detail)
    key = _cut(".".join(location))
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    where = "override" if line == _OVERRIDE else f"{source}:{line}" if line else source
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{_suggestion(kind, location)}"
    if detail["type"] == "missing":
        return f"{where}: required key '{key}' is missing"
    if detail["type"] == "model_type":
        return f"{where}: '{key}' is {_shown(detail['input'])} but must be a section with keys of its own"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = detail["input"]
    hint = " (YAML reads a bare yes/no/on/off as true/false: put it in quotes)" if isinstance(value, bool) else ""
    return f"{where}: '{key}' is {_shown(value)} but {message}{hint}" if key else f"{where}: {message}"


def _shown(value: Any) -> str:
    """A wrong value as it is written in Python, at a length that can be read."""
    try:
        return _cut(repr(value))
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _key_path(kind: type[Section], detail: ErrorDetails) -> KeyPath:
    """Pydantic's location without the names of union branches it appends after the field."""
    path: list[str] = []
    model: type[Section] | None = kind
    for step in detail["loc"]:
        if model is None:
            break
        path.append(str(step))
        model = _below(model, step)
    return tuple(path)


def _below(model: type[Section], step: str | int) -> type[Section] | None:
    """The section under a field; a number stands for an entry of the list that the section was found in."""
    if isinstance(step, int) or step.isdigit():
        return model
    field = model.model_fields.get(step)
    return _section_of(field.annotation) if field else None


def _section_of(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    sections = (_section_of(inner) for inner in get_args(annotation))
    return next((section for section in sections if section), None)


def _suggestion(kind: type[Section], location: KeyPath) -> str:
    model: type[Section] | None = kind
    for step in location[:-1]:
        model = _below(model, step) if model else None
    known = list(model.model_fields) if model else []
    close = difflib.get_close_matches(location[-1], known, n=1)
    return f": did you mean '{close[0]}'?" if close else f": the known keys here are {', '.join(known)}"
