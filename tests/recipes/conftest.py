"""A config for the tiny model, as a file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

MakeConfig = Callable[..., Path]


@pytest.fixture
def make_config(tiny_model_dir: Path, tiny_data: Path, tmp_path: Path) -> MakeConfig:
    """make_config(output="a", **{"lora.rank": 8}) → path of a YAML file for a 6-step run."""

    def make(output: str = "run", **changes: object) -> Path:
        values: dict[str, object] = {
            "output": str(tmp_path / output),
            "model": {"path": str(tiny_model_dir), "dtype": "float32"},
            "data": {"train": str(tiny_data), "validation_fraction": 0.2},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "optimizer": {"lr": 1e-2, "warmup_steps": 1},
            "training": {"epochs": 2, "max_steps": 6, "batch_size": 8, "micro_batch": 3},
            "eval": {"every_steps": 2},
            "checkpoint": {"every_steps": 2},
        }
        for dotted, value in changes.items():
            section, _, key = dotted.partition(".")
            values[section] = {**dict(values[section]), key: value}  # pyright: ignore
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return make
