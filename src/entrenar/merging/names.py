"""What models and files are called in what a merge writes: never by where they lie on this machine.

A result is made to be given away. Its card, metadata and report name a local model by the last part of its path, an
adapter over it likewise, and a model of the hub by its id.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from entrenar.merging.models import split_label

_PATH = re.compile(r"(?<![\w.:/~<-])(?:~|/)(?:[\w.@+-]*/)*[\w.@+-]+/?")


def shown_names(labels: Iterable[str]) -> dict[str, str]:
    """Label → what it is called, each once."""
    names = {label: "+".join(map(_last, filter(None, split_label(label)))) for label in labels}
    counts, seen = Counter(names.values()), Counter[str]()
    for label, name in names.items():
        seen[name] += 1
        if counts[name] > 1:
            names[label] = f"{name} ({seen[name]})"
    return names


def _last(path: str) -> str:
    is_local = Path(path).is_absolute() or path.startswith(("~", ".")) or os.path.lexists(path)
    return Path(path).name or Path(path).resolve().name if is_local else path


def without_paths(text: str, names: Mapping[str, str]) -> str:
    """A text in which models are called by their names and every other path of this machine by its last part."""
    for label in sorted(names, key=len, reverse=True):
        if names[label] != label:
            text = re.sub(rf"(?<![\w./~-]){re.escape(label)}(?![\w/.-]|\+)", lambda _, label=label: names[label], text)
    return _PATH.sub(_shortened, text)


def _shortened(match: re.Match[str]) -> str:
    path = match[0]
    first = path.split("/")[1] if path.startswith("/") else ""
    is_path = path.startswith("~/") or (bool(first) and path.count("/") > 1 and os.path.lexists(f"/{first}"))
    return Path(path).name if is_path else path
