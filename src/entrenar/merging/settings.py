"""What a parameter is worth for one tensor: scalars, gradients over the layers, values filtered by name.

A gradient's position in layer i of L is i / (L − 1). A filter is a part of a tensor's name; of several the first that
matches counts. Where a parameter is given at several levels, the nearest counts: source, slice, model, all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entrenar.core.errors import InputError
from entrenar.merging.registry import Method

Number = int | float


@dataclass(frozen=True)
class Level:
    """The parameters of one place in the config, such as `models.1.parameters`."""

    where: str
    values: Mapping[str, Any]
    used: set[tuple[str, int]] = field(default_factory=set)  # (parameter, place in its list of filters) that matched

    def find(self, name: str, tensor: str, position: float) -> Any:
        """The parameter's value for a tensor, None if this level has none."""
        setting = self.values.get(name)
        if setting is None or not _is_filtered(setting):
            return _at(setting, position)
        for index, entry in enumerate(setting):
            wanted = entry.get("filter")
            if wanted is None or wanted == "*" or str(wanted) in tensor:
                self.used.add((name, index))
                return _at(entry["value"], position)
        return None

    def check(self, method: Method) -> None:
        """InputError for a parameter the method does not read, or a list of filters that is none."""
        for name, setting in self.values.items():
            method.parameter(name, self.where)
            if not isinstance(setting, list):
                continue
            if not setting:
                raise InputError(f"{self.where}: parameter {name!r} is an empty list")
            for entry in setting:
                if isinstance(entry, dict) and ("value" not in entry or set(entry) - {"filter", "value"}):
                    raise InputError(
                        f"{self.where}: an entry of {name!r} is {entry}: it has `value` and may have `filter`"
                    )
            if len({isinstance(entry, dict) for entry in setting}) != 1:
                raise InputError(
                    f"{self.where}: {name!r} mixes plain values and entries with filters: use one or the other"
                )

    def check_filters(self) -> None:
        """InputError for a filter that matched no tensor; once every tensor has been looked at."""
        for name, setting in self.values.items():
            if not _is_filtered(setting):
                continue
            for index, entry in enumerate(setting):
                if entry.get("filter") not in (None, "*") and (name, index) not in self.used:
                    raise InputError(
                        f"{self.where}: the filter {entry['filter']!r} of {name!r} decides for no tensor: it is to be "
                        "part of a tensor's name, and no filter before it may match the same"
                    )


def _is_filtered(setting: Any) -> bool:
    return isinstance(setting, list) and bool(setting) and isinstance(setting[0], dict)


def _at(setting: Any, position: float) -> Any:
    """A scalar as it is; a gradient between its two nearest entries."""
    if not isinstance(setting, list):
        return setting
    place = position * (len(setting) - 1)
    below = min(int(place), len(setting) - 1)
    low, high = setting[below], setting[min(below + 1, len(setting) - 1)]
    numbers = all(isinstance(end, Number) and not isinstance(end, bool) for end in (low, high))
    return low + (high - low) * (place - below) if numbers else setting[round(place)]


def options_for(
    method: Method, tensor: str, position: float, shared: Sequence[Level], models: Sequence[Sequence[Level]]
) -> dict[str, Any]:
    """Every parameter of the method for one tensor.

    Args:
        shared: levels of what holds for all models, nearest first. models: the same for each model.
    """
    options: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        levels = models if parameter.each else [shared]
        found = [_nearest(name, tensor, position, places) for places in levels]
        checked = []
        for index, (value, where) in enumerate(found):
            if value is None and parameter.is_required:
                whose = f" for model {index + 1} ({models[index][0].where})" if parameter.each else ""
                raise InputError(f"{method.name} needs the parameter {name!r}{whose}: no level gives it for {tensor}")
            checked.append(parameter.check(name, parameter.default if value is None else value, where))
        options[name] = tuple(checked) if parameter.each else checked[0]
    return options


def _nearest(name: str, tensor: str, position: float, levels: Sequence[Level]) -> tuple[Any, str]:
    for level in levels:
        value = level.find(name, tensor, position)
        if value is not None:
            return value, level.where
    return None, "the default"
