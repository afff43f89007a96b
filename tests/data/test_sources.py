"""Entries of `data.train` → files: patterns, directories, and what is told where there is nothing."""

import re
from pathlib import Path

import pytest

from entrenar.core.errors import InputError
from entrenar.data.sources import Source, files_of, is_hub_id


def _directory(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text("{}")
    return tmp_path / "rows"


def _names(path: str | Path) -> list[str]:
    return [file.name for file in files_of(Source(path=str(path)), "train").paths]


def test_a_directory_gives_its_data_files_in_order_and_names_the_others(tmp_path: Path) -> None:
    names = ("b.jsonl", "a.parquet", "C.CSV", "d.json.gz", "README.md", "state.json", ".hidden.jsonl", "more/e.jsonl")
    directory = _directory(tmp_path, *names)
    assert _names(directory) == ["C.CSV", "a.parquet", "b.jsonl", "d.json.gz"]
    assert files_of(Source(path=str(directory)), "train").others == ["README.md", "more/", "state.json"]


def test_a_pattern_gives_the_files_that_match_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _directory(tmp_path, "b.jsonl", "a.jsonl", "a.txt", "more/c.jsonl", "dir.jsonl/x.jsonl")
    assert _names(directory / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert _names(directory / "[ab].*") == ["a.jsonl", "a.txt", "b.jsonl"]
    assert _names(directory / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl", "x.jsonl", "c.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert files_of(Source(path="rows/?.jsonl"), "train").paths == [Path("rows/a.jsonl"), Path("rows/b.jsonl")]


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path) -> None:
    assert _names(_directory(tmp_path, "[ab].jsonl", "a.jsonl") / "[ab].jsonl") == ["[ab].jsonl"]


@pytest.mark.parametrize(
    ("names", "entry", "sentence"),
    [
        (["a.csv"], {"path": "rows/*.jsonl"}, r"^no file matches \S*rows/\*\.jsonl: check the pattern$"),
        (["more/a.csv"], {"path": "rows/*"}, r"^no file matches "),
        (
            ["README.md", "x/a.csv"],
            {"path": "rows"},
            r"^directory \S*rows has no data file in it \(it has README.md, x/",
        ),
        (["a.csv"], {"path": "rows/a.csv", "split": "train"}, r"is no hub dataset .* leave them out"),
        (["a.csv"], {"path": "rows", "revision": "main"}, r"is no hub dataset .* leave them out"),
        (["a.csv"], {"path": "rows/*", "split": "test"}, r"is no hub dataset .* leave them out"),
    ],
)
def test_what_names_no_rows_is_one_sentence(
    tmp_path: Path, names: list[str], entry: dict[str, str], sentence: str
) -> None:
    _directory(tmp_path, *names)
    with pytest.raises(InputError, match=sentence) as caught:
        files_of(Source.model_validate({**entry, "path": str(tmp_path / entry["path"])}), "train")
    assert "\n" not in str(caught.value)


def test_an_empty_directory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^directory {re.escape(str(tmp_path))} has no data file in it: name the"):
        files_of(Source(path=str(tmp_path)), "train")


@pytest.mark.parametrize("path", ["no\0name", "x" * 5000, "absent.jsonl", "rows/absent.jsonl"])
def test_a_file_that_cannot_be_there_is_left_to_its_reader(path: str) -> None:
    assert files_of(Source(path=path), "train").paths == [Path(path)]


def test_a_hub_id_is_an_organisation_and_a_name() -> None:
    assert all(map(is_hub_id, ("org/name", "HuggingFaceH4/ultrachat_200k", "a/b.c-d")))
    assert not any(map(is_hub_id, ("name", "a/b/c", "./a", "/a/b", "rows/a.jsonl", "a/b.parquet", "a/*", "", "a/")))
