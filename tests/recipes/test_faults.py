"""A run that is killed, or whose disk is full, where it writes: it says so in a sentence, and the same command goes on
to the same bits. A few points here; all of them in tests/interop/test_run_faults.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_faults import FULL, KILL, Ending, outcome, run

MakeConfig = Callable[..., Path]
CHANGES: dict[str, Any] = {
    "training.max_steps": 2, "eval.every_steps": 1, "eval.patience": 2, "checkpoint.every_steps": 1,
    "lora.targets": ["q_proj"],
}  # fmt: skip
# The n-th of the points that are called so.
POINTS = (
    (KILL, "fsync", 0), (KILL, "os.rename .config.yaml", 0), (KILL, "write write", 0), (KILL, "os.rename .adapter", 0),
    (FULL, "write serialize_file", 0), (FULL, "write write", 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def straight() -> list[tuple[Ending, tuple[Any, ...]]]:
    """The run without a fault, once it is made."""
    return []


@pytest.mark.parametrize(("kind", "name", "which"), POINTS)
def test_the_same_command_goes_on_to_the_same_bits(
    make_config: MakeConfig, tmp_path: Path, straight: list[Any], kind: str, name: str, which: int
) -> None:
    if not straight:
        whole = run(make_config("straight", **CHANGES), tmp_path / "straight")
        assert whole is not None
        straight.append((whole.points, outcome(tmp_path / "straight")))
    points, expected = straight[0]
    at = [number for number, point in enumerate(points) if point.startswith(name)][which]
    broken = run(make_config(**CHANGES), tmp_path / "run", kind, at)
    if kind == KILL:
        assert broken is None
    else:
        assert broken is not None
        assert (broken.traceback, broken.exit_code, broken.sentence.count("\n")) == ("", 1, 0)
    again = run(make_config(**CHANGES), tmp_path / "run")
    assert again is not None
    assert not again.traceback + again.sentence
    assert outcome(tmp_path / "run") == expected
    assert not [path.name for path in tmp_path.rglob(".*")]
