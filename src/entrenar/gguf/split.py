"""A model that is split over several GGUF files, `NAME-00001-of-0000N.gguf`, as one.

The first part holds the metadata; each says its number (`split.no`, from 0), how many there are (`split.count`) and
how many tensors all of them hold (`split.tensors.count`): llama.cpp's gguf-split.
"""

import re
from pathlib import Path
from typing import Any

from entrenar.core.errors import InputError, listing
from entrenar.files.stored_tensor import StoredTensor
from entrenar.gguf.reader import GGUFFile, TensorInfo

_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 10_000


class GGUFModel:
    """The metadata and tensors of a GGUF, in one file or in parts; any part's path names them all.

    Raises:
        InputError: a part is missing, broken or another model's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = _open_parts(path)
        self.metadata: dict[str, Any] = self.parts[0].metadata
        self.raw_metadata = self.parts[0].raw_metadata
        self._owner = {name: part for part in self.parts for name in part.tensors}
        self.tensors: dict[str, TensorInfo] = {name: part.tensors[name] for name, part in self._owner.items()}
        _check_tensors(self)

    @property
    def version(self) -> int:
        """The format's version."""
        return self.parts[0].version

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies; see GGUFFile."""
        return self._owner[name].stored(name)

    def blocks(self, name: str) -> StoredTensor:
        """Its bytes as they stand; see GGUFFile."""
        return self._owner[name].blocks(name)


def _open_parts(path: Path) -> list[GGUFFile]:
    first = GGUFFile(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= MAX_PARTS:
        raise InputError(f"{path} says it is one of {count!r} parts: at most {MAX_PARTS} are read")
    if count <= 1:
        return [first]
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise InputError(f"{path} is one of {count} parts, so it must be called NAME-00001-of-{count:05}.gguf")
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise InputError(f"{path} is one of {count} parts, and beside it are missing: {listing(missing, 3)}")
    parts = [first if part == path else GGUFFile(part) for part in paths]
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise InputError(f"{part.path} is not part {number + 1} of {count}, whatever its name says: fetch it again")
    return parts


def _check_tensors(model: GGUFModel) -> None:
    held = sum(len(part.tensors) for part in model.parts)
    if held != len(model.tensors):
        raise InputError(f"the parts of {model.path} hold a tensor twice: they are not of one model")
    said = model.metadata.get("split.tensors.count", held)
    if said != held:
        raise InputError(f"the parts of {model.path} hold {held} tensors, but the first says {said}: fetch them again")
