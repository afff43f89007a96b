"""metrics.jsonl: complete lines, and after a resume the log of a run that never stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.core.run_log import MetricsLog, read_metrics


def write_steps(path: Path, steps: list[int], after_step: int = 0) -> None:
    log = MetricsLog(path, after_step)
    for step in steps:
        log.write({"step": step, "loss": 1 / step})
    log.close()


def test_each_row_is_one_json_line_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 0.1}, {"step": 2, "note": "line\nbreak \u2028 ±"}]
    for count, row in enumerate(rows, start=1):
        log.write(row)
        lines = path.read_text(encoding="utf-8").split("\n")
        assert lines.pop() == ""
        assert [json.loads(line) for line in lines] == rows[:count]
    log.close()
    assert read_metrics(path) == rows


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    write_steps(path, [1])
    assert [row["step"] for row in read_metrics(path)] == [1]


@given(done=st.integers(1, 8), saved=st.integers(0, 8), extra=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_resumed_log_reads_like_that_of_a_run_that_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, done: int, saved: int, extra: int
) -> None:
    saved = min(saved, done)
    last = done + extra
    directory = tmp_path_factory.mktemp("log")
    write_steps(directory / "straight", list(range(1, last + 1)))
    write_steps(directory / "resumed", list(range(1, done + 1)))
    write_steps(directory / "resumed", list(range(saved + 1, last + 1)), after_step=saved)
    assert (directory / "resumed").read_bytes() == (directory / "straight").read_bytes()


@given(st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_a_log_cut_anywhere_by_a_crash_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    whole = path.read_bytes()
    size = max(len(whole) - cut, 0)
    path.write_bytes(whole[:size])
    complete = sum(end - 1 <= size for end in ends(whole))  # a row that lost its line break alone is complete
    assert [row["step"] for row in read_metrics(path)] == list(range(1, complete + 1))


def ends(data: bytes) -> list[int]:
    """Offset just after each line break."""
    return [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]


def test_a_cut_log_can_be_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-5])
    write_steps(path, [3, 4], after_step=2)
    write_steps(tmp_path / "straight", [1, 2, 3, 4])
    assert path.read_bytes() == (tmp_path / "straight").read_bytes()
