"""A dataset by its hub id: the files of one split, fetched into the hub's cache if they are not there.

huggingface_hub decides what is fetched and what the cache already has; HF_HUB_OFFLINE, HF_HOME and a token are its own.
"""

import glob
from pathlib import Path
from typing import Any

from entrenar.core.documents import read_json, read_text
from entrenar.core.errors import InputError, first_line
from entrenar.data.splits import split_files

_CARD = "README.md"


def hub_files(dataset: str, split: str, revision: str | None = None) -> list[Path]:
    """The data files of a split, sorted.

    Raises:
        InputError: out of reach and not in the cache, or see `split_files`.
    """
    root = _fetch(dataset, revision, [_CARD])
    names = _names(dataset, root)
    card = read_text(root / _CARD, "dataset card") if (root / _CARD).exists() else ""
    files = split_files(dataset, names, card, split)
    # The commit, not the revision: a branch may have moved since. Offline this says whether the files are all there.
    _fetch(dataset, root.name, [glob.escape(name) for name in files])
    return [root / name for name in files]


def _fetch(dataset: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(dataset, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"data {dataset!r} is not a file, a directory or a hub dataset within reach{at}: {first_line(error)}"
        ) from None


def _names(dataset: str, root: Path) -> list[str]:
    """All files of the dataset; where the hub cannot be asked, by what the cache knows of this commit, which is more
    than what it has of it after a fetch that was broken off."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(dataset, revision=root.name, repo_type="dataset")
    except Exception:
        known = root.parent.parent / "trees" / f"{root.name}.json"
        if known.is_file():
            return list(read_json(known, "listing of a dataset", dict[str, Any]).get("files") or [])
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
