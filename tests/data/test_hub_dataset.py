"""A dataset by its hub id: from the cache, and by huggingface_hub from a hub on this machine."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

from entrenar.core.errors import InputError
from entrenar.data.sources import Source, files_of
from tests.support.hub import COMMIT, cached_dataset, serving

_FILES = {
    "README.md": "# A dataset",
    "data/train-00000-of-00002.jsonl": '{"text": "one"}\n',
    "data/train-00001-of-00002.jsonl": '{"text": "two"}\n',
    "data/test-00000-of-00001.jsonl": '{"text": "three"}\n',
}
_FETCH = """
import sys
from entrenar.core.errors import InputError
from entrenar.data.sources import Source, files_of
try:
    print(*files_of(Source(path="org/name", revision=sys.argv[1] or None), "train").paths, sep="\\n")
except InputError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def _names(**entry: str) -> list[str]:
    return [file.name for file in files_of(Source.model_validate({"path": "org/name", **entry}), "train").paths]


def test_the_files_of_a_split_are_read_from_the_cache(cache: Path) -> None:
    cached_dataset(cache, "org/name", _FILES)
    assert _names() == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert _names(split="test") == _names(split="test", revision=COMMIT) == ["test-00000-of-00001.jsonl"]
    [path] = files_of(Source(path="org/name", split="test"), "train").paths
    assert path.read_text() == _FILES["data/test-00000-of-00001.jsonl"]


def test_a_directory_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/a.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert _names() == ["a.jsonl"]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({}, r"^data 'org/other' is not a file, a directory or a hub dataset within reach: .*HF_HUB_OFFLINE"),
        ({"revision": "v2"}, r"within reach at revision 'v2': "),
        ({"path": "org/name", "revision": "v2"}, r"^data 'org/name' is not .* within reach at revision 'v2': "),
        ({"path": "org/name", "split": "dev"}, r"^dataset org/name has no data file of a split 'dev'"),
    ],
)
def test_out_of_reach_is_one_sentence(cache: Path, entry: dict[str, str], sentence: str) -> None:
    cached_dataset(cache, "org/name", _FILES)
    with pytest.raises(InputError, match=sentence) as caught:
        _names(**{"path": "org/other", **entry})
    assert "\n" not in str(caught.value)


def test_a_copy_that_lacks_a_numbered_file_is_refused(cache: Path) -> None:
    cached_dataset(cache, "org/name", {name: text for name, text in _FILES.items() if "train-00001" not in name})
    with pytest.raises(InputError, match=r"lacks data/train-00001-of-00002\.jsonl here: fetch it again"):
        _names()


def _fetched(endpoint: str, home: Path, changes: Mapping[str, str], revision: str = "") -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **changes}
    run = subprocess.run([sys.executable, "-c", _FETCH, revision], env=env, capture_output=True, text=True, timeout=120)
    assert not run.returncode, run.stderr
    return run.stdout.strip()


def test_only_the_files_of_the_split_are_fetched_and_then_they_are_here(tmp_path: Path) -> None:
    with serving("org/name", _FILES) as (endpoint, fetched):
        paths = [Path(line) for line in _fetched(endpoint, tmp_path, {}).splitlines()]
        assert [path.read_text() for path in paths] == [_FILES[name] for name in sorted(_FILES) if "train" in name]
        assert sorted(fetched) == ["README.md", *(name for name in sorted(_FILES) if "train" in name)]
        assert "hub dataset within reach at revision 'v9'" in _fetched(endpoint, tmp_path, {}, "v9")
    for changes in ({"HF_HUB_OFFLINE": "1"}, {}):  # nobody may be asked; nobody answers
        again = _fetched(endpoint, tmp_path, changes)
        assert [Path(line) for line in again.splitlines()] == paths
    assert "within reach" in _fetched(endpoint, tmp_path / "empty", {})
    paths[0].unlink()  # as if the fetch had been broken off
    assert "hub dataset within reach" in _fetched(endpoint, tmp_path, {"HF_HUB_OFFLINE": "1"})
