"""Which files of a hub dataset are of a split: by its card, else by their names, as `datasets` reads them."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from entrenar.core.errors import InputError, listing
from entrenar.files.data_file import is_data_file

# What a name may say for a split.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(.*)")


def split_files(dataset: str, names: Sequence[str], card: str, split: str) -> list[str]:
    """The data files of a split, sorted. `names`: all files of the dataset; `card`: its README.md, or "".

    Raises:
        InputError: there is no such split, the card has several subsets and none is the default, or of files that are
            numbered `-00001-of-00003` one is missing.
    """
    data = sorted(name for name in names if is_data_file(name))
    patterns = _card_patterns(dataset, card)
    if patterns:
        if split not in patterns:
            raise InputError(f"dataset {dataset} has no split {split!r}: it has {listing(list(patterns))}")
        expressions = [_expression(pattern) for pattern in patterns[split]]
        files = [name for name in data if any(expression.fullmatch(name) for expression in expressions)]
    else:
        files = _by_name(data, split)
    if not files:
        raise InputError(
            f"dataset {dataset} has no data file of a split {split!r}: it has {listing(list(names)) or 'no files'}; "
            "set split, or download it and name its files"
        )
    _refuse_gaps(dataset, files)
    return files


def _by_name(data: list[str], split: str) -> list[str]:
    """Files that are named for the split; all, where none is named for any and the split is train."""
    named = [name for name in data if _says(name, _WORDS.get(split, (split,)))]
    is_told = any(_says(name, words) for name in data for words in _WORDS.values())
    return data if split == "train" and not is_told else named


def _says(name: str, words: Sequence[str]) -> bool:
    return any(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z])", name.lower()) for word in words)


def _card_patterns(dataset: str, card: str) -> dict[str, list[str]]:
    """Split → patterns of the card's default subset; none where the card does not say."""
    subsets = [subset for subset in _subsets(dataset, card) if subset.get("data_files")]
    if not subsets:
        return {}
    chosen = [s for s in subsets if s.get("default") is True or s.get("config_name") == "default"] or subsets
    if len(chosen) > 1:
        names = [str(subset.get("config_name")) for subset in chosen]
        raise InputError(
            f"dataset {dataset} has the subsets {listing(names)} and no default: download it and name the files of one"
        )
    folder = str(chosen[0].get("data_dir") or "").strip("/")
    patterns = dict[str, list[str]]()
    for split, pattern in _pairs(chosen[0]["data_files"]):
        patterns.setdefault(split, []).append(f"{folder}/{pattern}" if folder else pattern)
    return patterns


def _subsets(dataset: str, card: str) -> list[dict[str, Any]]:
    """`configs` of the card's YAML head."""
    head = re.match(r"\s*---\s*\n(.*?)\n---", card, re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(
            f"dataset {dataset} has a card whose head is not YAML: download it and name its files"
        ) from None
    configs = values.get("configs") if isinstance(values, dict) else None
    return [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []


def _pairs(data_files: Any) -> Iterator[tuple[str, str]]:
    """(split, pattern) of `data_files`: a pattern, a list of them, or a list of {split, path}."""
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        given = entry if isinstance(entry, dict) else {"path": entry}
        paths = given.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            yield str(given.get("split") or "train"), str(path)


def _expression(pattern: str) -> re.Pattern[str]:
    """A pattern of paths: `*` stays within a directory, `**` does not."""
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return re.compile("".join(signs.get(part) or re.escape(part) for part in parts))


def _refuse_gaps(dataset: str, files: list[str]) -> None:
    """A copy that was not fetched to its end lacks some of the files that number themselves."""
    for file in files:
        shard = _SHARD.fullmatch(file)
        if shard:
            start, _, count, end = shard.groups()
            missing = [f"{start}-{n:05}-of-{count}{end}" for n in range(min(int(count), 100_000))]
            missing = [name for name in missing if name not in files]
            if missing:
                raise InputError(f"dataset {dataset} lacks {listing(missing, 3)} here: fetch it again")
