"""The README's Python and the quickstart's files do what they say."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from entrenar.cli.app import run
from entrenar.core.config import load_config
from entrenar.recipes.config import RunConfig

ROOT = Path(__file__).parents[2]


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], smollm2: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / smollm2.name).symlink_to(smollm2)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("3 ")
    assert said[1] == "60 layers adapted"
    assert (tmp_path / "runs/readme/model.gguf").stat().st_size > 100_000_000
    assert "quantized" in said[-1]
    assert (tmp_path / "runs/kept/Modelfile").is_file()


def test_the_readmes_first_run_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: Path) -> None:
    """The commands as they stand, but for the number of steps."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / smollm2.name).symlink_to(smollm2)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## A run in 30 seconds")[2]
    commands = section.partition("```sh\n")[2].partition("```")[0].replace("max_steps=10", "max_steps=1").splitlines()
    assert len(commands) == 3
    for command in commands:
        assert run(shlex.split(command)[1:]) == 0
    assert (tmp_path / "runs/first/adapter").is_dir()


def test_the_quickstarts_data_is_what_its_builder_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["build_data.py", "--check"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples/quickstart/build_data.py"), run_name="__main__")
    assert not stop.value.code


def test_the_quickstart_is_a_valid_config_over_enough_rows() -> None:
    config = load_config(RunConfig, ROOT / "examples/quickstart.yaml")
    train, held_out = (
        [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
        for path in (config.data.train[0].path, "examples/quickstart/heldout.jsonl")
    )
    assert len(train) >= 400
    assert len(held_out) >= 60
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
