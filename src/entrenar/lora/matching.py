"""Which modules the fields of an adapter's config name: peft's rules, on names alone.

They are not one rule but four. Targets: a list names a module by its whole path or its end after a dot, a string is a
regular expression for the whole path. Layers: the first number in the path. Excluded: as targets. Trained whole: the
end of the path without a dot before it, so that `norm` names every `post_attention_layernorm` too; what lies in such a
module by a path of whole words is no target.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from entrenar.core.errors import InputError, listing

Targets = str | Sequence[str]
ALL_LINEAR = "all-linear"


def is_all_linear(targets: Targets) -> bool:
    """Whether the targets are the word for every linear layer, in any case."""
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def has_suffix(name: str, target: str) -> bool:
    """Whether a path is `target` or ends with it after a dot."""
    return name == target or name.endswith(f".{target}")


def named_by(names: Iterable[str], targets: Targets, what: str = "LoRA target") -> list[str]:
    """The paths that `targets` name; `what` is the word for them in errors.

    Raises:
        InputError: a string that is not a regular expression.
    """
    if not isinstance(targets, str):
        return [name for name in names if any(has_suffix(name, target) for target in targets)]
    pattern = _compiled(targets, what)
    return [name for name in names if pattern.fullmatch(name)]


def allowed(names: Iterable[str], exclude: Targets, saved: Sequence[str]) -> list[str]:
    """The paths that are neither excluded nor within a module that is trained whole (`saved`)."""
    names = list(names)
    out = set(named_by(names, exclude, "excluded module")) if exclude else set[str]()
    patterns = [_compiled(rf"(^|.*\.){module}($|\..*)", "module to save") for module in saved]
    return [name for name in names if name not in out and not any(pattern.match(name) for pattern in patterns)]


def in_layers(
    names: Iterable[str], layers: Sequence[int] | int | None, pattern: Sequence[str] | str | None
) -> list[str]:
    """The paths in the layers of these numbers; None or empty: in any. `pattern`: the word before the number."""
    if layers is None or (not isinstance(layers, int) and not layers):
        return list(names)
    wanted = {layers} if isinstance(layers, int) else set(layers)
    return [name for name in names if _layer_of(name, pattern) in wanted]


def _layer_of(name: str, pattern: Sequence[str] | str | None) -> int | None:
    words = [pattern] if isinstance(pattern, str) else list(pattern or ())
    expressions = [rf"(?:^|.*?\.){word}\.(?P<idx>\d+)\." for word in words] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    for expression in expressions:
        if match := _compiled(expression, "layers_pattern").match(name):
            return int(match["idx"])
    return None


def saved_whole(names: Iterable[str], saved: Sequence[str]) -> list[str]:
    """The paths of the modules that `modules_to_save` names, without what lies within one of them."""
    paths: list[str] = []
    inside: tuple[str, ...] = ()
    for name in names:  # parents come first
        if name and any(name.endswith(word) for word in saved) and not name.startswith(inside):
            paths.append(name)
            inside = (*inside, f"{name}.")
    return paths


def check_complete(layers: Sequence[str], expected: Iterable[str], source: str) -> None:
    """InputError unless the layers that an adapter's file has are those that its config names.

    peft leaves the first kind without an adapter (its warning: missing adapter keys), and what the file has beyond its
    config unused.
    """
    wanted, have = list(expected), set(layers)
    missing = [name for name in wanted if name not in have]
    beyond = [name for name in layers if name not in set(wanted)]
    if missing:
        raise InputError(
            f"{source} has no factors for {len(missing)} layers of this model that its config names, so it is "
            f"incomplete or for another model: {listing(missing, 3)}"
        )
    if beyond:
        raise InputError(
            f"{source} has factors for {len(beyond)} layers that its config does not name, which peft would not use: "
            f"{listing(beyond, 3)}; mend its target_modules"
        )


def unused(names: Sequence[str], wanted: Sequence[str], matches: Callable[[str, str], bool]) -> list[str]:
    """Those of `wanted` that match none of the names."""
    return [one for one in wanted if not any(matches(name, one) for name in names)]


def _compiled(expression: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{what} {expression[:200]!r} is not a regular expression: {error}") from None
