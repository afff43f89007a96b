"""Points at which a run writes, one of every few: killed there, and the disk full from there on. Minutes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.run_faults import FULL, KILL, outcome, run

MakeConfig = Callable[..., Path]
_STRIDE = 4  # 1: every point, ten minutes
pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kind", [KILL, FULL])
def test_every_fault_is_survived(make_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    changes = {
        "training.max_steps": 4, "eval.every_steps": 2, "eval.patience": 2, "checkpoint.every_steps": 1,
        "lora.targets": ["q_proj"],
    }  # fmt: skip
    straight = run(make_config("straight", **changes), tmp_path / "straight")
    assert straight is not None
    assert len(straight.points) > 100
    for at, point in list(enumerate(straight.points))[::_STRIDE]:
        broken = run(make_config(**changes), tmp_path / "run", kind, at)
        if broken is not None and broken.sentence:
            assert (broken.exit_code, broken.sentence.count("\n")) == (1, 0), point
        assert broken is None or not broken.traceback, (at, point, broken.traceback)
        again = run(make_config(**changes), tmp_path / "run")
        assert again is not None, point
        assert not again.traceback + again.sentence, (at, point)
        assert outcome(tmp_path / "run") == outcome(tmp_path / "straight"), (at, point)
        assert not list(tmp_path.rglob(".*")), (at, point)
        shutil.rmtree(tmp_path / "run")
