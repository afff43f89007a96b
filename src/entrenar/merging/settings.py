"""What a parameter is worth for one tensor: scalars, gradients over the layers, values filtered by name.

A gradient's position in layer i of L is i / (L − 1). A filter is a part of a tensor's name; of several the first that
matches counts. Where a parameter is given at several levels, the nearest counts: source, slice, model, all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entrenar.core.errors import InputError
from entrenar.merging.registry import Method, Parameter

Number = int | float
_MOST_SHOWN = 80


@dataclass(frozen=True)
class Level:
    """The parameters of one place in the config, such as `models.1.parameters`."""

    where: str
    values: Mapping[str, Any]
    used: set[tuple[str, int]] = field(default_factory=set)  # (parameter, place in its list of filters) that matched

    def find(self, name: str, tensor: str, position: float, checked: Callable[[Any], Any] = lambda value: value) -> Any:
        """The parameter's value for a tensor, each of its values `checked`; None if this level has none."""
        setting = self.values.get(name)
        if isinstance(setting, dict):  # one entry needs no list
            setting = [setting]
        if setting is None or not _is_filtered(setting):
            return _at(setting, position, checked)
        for index, entry in enumerate(setting):
            wanted = entry.get("filter")
            if wanted is None or wanted == "*" or str(wanted) in tensor:
                self.used.add((name, index))
                return _at(entry["value"], position, checked)
        return None

    def check(self, method: Method) -> None:
        """InputError for a parameter the method does not read, or a list of filters that is none."""
        for name, setting in self.values.items():
            method.parameter(name, self.where)
            if isinstance(setting, dict):
                setting = [setting]
            if not isinstance(setting, list):
                continue
            if not setting:
                raise InputError(f"{self.where}: parameter {name!r} is an empty list")
            for entry in setting:
                if isinstance(entry, dict) and not _is_entry(entry):
                    raise InputError(
                        f"{self.where}: an entry of {name!r} is {_short(entry)}: it has `value` and may have `filter`: "
                        "a value or a list of them along the layers, and a text"
                    )
            if len({isinstance(entry, dict) for entry in setting}) != 1:
                raise InputError(
                    f"{self.where}: {name!r} mixes plain values and entries with filters: use one or the other"
                )

    def check_filters(self) -> None:
        """InputError for a filter that matched no tensor; once every tensor has been looked at."""
        for name, setting in self.values.items():
            if isinstance(setting, dict) or not _is_filtered(setting):
                setting = [setting] if isinstance(setting, dict) else []
            for index, entry in enumerate(setting):
                if entry.get("filter") not in (None, "*") and (name, index) not in self.used:
                    raise InputError(
                        f"{self.where}: the filter {entry['filter']!r} of {name!r} decides for no tensor: it is to be "
                        "part of a tensor's name, and no filter before it may match the same"
                    )


def _is_filtered(setting: Any) -> bool:
    return isinstance(setting, list) and bool(setting) and isinstance(setting[0], dict)


def _is_entry(entry: Mapping[str, Any]) -> bool:
    value, wanted = entry.get("value"), entry.get("filter")
    is_list = isinstance(value, list) and bool(value) and not any(isinstance(element, list | dict) for element in value)
    return (
        set(entry) <= {"filter", "value"}
        and (is_list or isinstance(value, Number | str | bool))
        and (isinstance(wanted, str | None))
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _at(setting: Any, position: float, checked: Callable[[Any], Any]) -> Any:
    """A scalar as it is; of numbers along the layers between the two nearest, of anything else the one before."""
    if setting is None:
        return None
    if not isinstance(setting, list):
        return checked(setting)
    values = [checked(value) for value in setting]
    place = position * (len(values) - 1)
    below = min(int(place), len(values) - 1)
    if not all(isinstance(value, Number) and not isinstance(value, bool) for value in values):
        return values[below]
    share = place - below
    return checked((1 - share) * values[below] + share * values[min(below + 1, len(values) - 1)])


def options_for(
    method: Method, tensor: str, position: float, shared: Sequence[Level], models: Sequence[Sequence[Level]],
    names: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Every parameter of the method for one tensor.

    Args:
        shared: levels of what holds for all models, nearest first. models: the same for each model. names: what each
            model calls the tensor, where that is another name: filters of what a model has of its own look at it.
    """
    options: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        levels = models if parameter.is_per_model else [shared]
        called = names if parameter.is_per_model and names else [tensor] * len(levels)
        settings = [
            _nearest(name, parameter, name_there, position, places)
            for name_there, places in zip(called, levels, strict=True)
        ]
        checked = []
        for index, (value, where) in enumerate(settings):
            if value is None and parameter.is_required:
                whose = f" for model {index + 1} ({models[index][0].where})" if parameter.is_per_model else ""
                raise InputError(f"{method.name} needs the parameter {name!r}{whose}: no level gives it for {tensor}")
            checked.append(parameter.check(name, parameter.default, where) if value is None else value)
        options[name] = tuple(checked) if parameter.is_per_model else checked[0]
    return options


def _nearest(name: str, parameter: Parameter, tensor: str, position: float, levels: Sequence[Level]) -> tuple[Any, str]:
    for level in levels:
        value = level.find(name, tensor, position, lambda value, at=level.where: parameter.check(name, value, at))
        if value is not None:
            return value, level.where
    return None, "the default"
