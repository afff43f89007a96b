"""Killed, or out of disk, at the places where a merge writes: the same command ends with the same bytes; links."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from entrenar.core.errors import InputError
from entrenar.merging.place import export_directory, statistics_directory, working_directory
from entrenar.recipes.merge import merge
from tests.support import merge_faults as faults


def config(trio: dict[str, str], **changes: Any) -> dict[str, Any]:
    models = [{"model": trio[name], "parameters": {"weight": 0.5, "density": 0.4}} for name in "ab"]
    return {"merge_method": "ties", "base_model": trio["base"], "models": models, **changes}


@pytest.mark.parametrize("how", ["kill", "full"])
def test_whatever_call_fails_the_same_command_goes_on_to_the_same_bytes(
    tmp_path: Path, trio: dict[str, str], how: faults.How
) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def work() -> None:
        merge(config(trio), place / "out")

    assert faults.forked(work) == (0, "")
    straight = faults.contents(place)
    faults.clear(place)
    count = faults.points(work, place)
    assert count > 20
    for strike in range(0 if how == "kill" else 3, count, 6):  # every one takes a minute and passes too

        def struck(strike: int = strike) -> None:
            faults.at(place, strike, how)
            work()

        faults.clear(place)
        code, said = faults.forked(struck)
        assert code in ((0, faults.KILLED if how == "kill" else 1)), said
        assert code != 1 or "no space left" in said
        if not (place / "out").exists():
            assert faults.forked(work) == (0, "")
        assert faults.contents(place) == straight, strike


@pytest.mark.parametrize("hidden", [working_directory, export_directory, statistics_directory])
def test_a_link_where_a_merge_works_is_refused_and_what_it_points_to_stays(
    tmp_path: Path, trio: dict[str, str], hidden: Any
) -> None:
    treasure, output = tmp_path / "treasure", tmp_path / "out"
    treasure.mkdir()
    (treasure / "file").write_text("mine")
    hidden(output).symlink_to(treasure)
    asked = config(trio)
    if hidden is working_directory:
        with pytest.raises(InputError, match=r"where this merge works, is a link to .*treasure"):
            merge(asked, output)
        assert not output.exists()
    else:
        merge(asked, output)
    assert (treasure / "file").read_text() == "mine"
    assert hidden(output).is_symlink()


@pytest.mark.parametrize("name", ["journal.jsonl", "model.safetensors", "README.md", "config.json"])
@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
def test_files_in_the_working_folder_that_are_links_are_not_written_through(
    tmp_path: Path, trio: dict[str, str], name: str, make: Any
) -> None:
    def stop(done: int, size: int) -> None:
        if done * 2 > size:
            raise KeyboardInterrupt

    output, mine = tmp_path / "out", tmp_path / "mine"
    with pytest.raises(KeyboardInterrupt):
        merge(config(trio), output, progress=stop)
    planted = working_directory(output) / name
    content = planted.read_bytes() if planted.exists() else b"mine"
    mine.write_bytes(content)
    planted.unlink(missing_ok=True)
    make(planted, mine)
    merge(config(trio), output)
    assert mine.read_bytes() == content
    assert mine.stat().st_nlink == 1
    assert not any(path.is_symlink() for path in output.iterdir())


def test_places_where_nothing_can_be_written(tmp_path: Path, trio: dict[str, str]) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(InputError, match="cannot write"):
            merge(config(trio), output)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_merge_of_another_kind_left_is_cleaned_up(tmp_path: Path, trio: dict[str, str]) -> None:
    output = tmp_path / "out"
    (export_directory(output) / "0" / "merged").mkdir(parents=True)
    merge(config(trio), output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_process_is_told(tmp_path: Path, trio: dict[str, str]) -> None:
    told: list[str] = []

    def second(_done: int, _size: int) -> None:
        def other() -> None:
            try:
                merge(config(trio), tmp_path / "out", type="nf4")
            except InputError as error:
                told.append(str(error))

        if not told:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    merge(config(trio), tmp_path / "out", progress=second)
    assert "another process is writing" in told[0]
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208
