"""Doubts are said where a plan cannot work, and not where it can."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entrenar.core.config import load_config
from entrenar.data.dataset import PreparedData, prepare
from entrenar.recipes import doubts as module
from entrenar.recipes.check import check
from entrenar.recipes.config import RunConfig
from entrenar.recipes.doubts import afterthoughts, doubts
from entrenar.recipes.train import make_plan, train

MakeConfig = Callable[..., Path]


@pytest.fixture
def data(tiny_data: Path, tiny_tokenizer: Any) -> PreparedData:
    return prepare(tiny_tokenizer, tiny_data, validation_fraction=0.2)


def said(make_config: MakeConfig, data: PreparedData, **changes: Any) -> list[str]:
    config = load_config(RunConfig, make_config(**changes))
    return doubts(config, make_plan(config, data), data, 1000)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optimizer.lr": 1.0}, "optimizer.lr 1 will make the loss explode"),
        (
            {"optimizer.lr": 2e-4, "training.max_steps": 12},
            r"^12 updates .* teach next to nothing: lower training\.batch",
        ),
        ({"optimizer.warmup_steps": 6}, "warmup_steps 6 does not end within the run's 6 updates"),
        ({"training.max_steps": 100}, r"max_steps 100 goes beyond training\.epochs 2, .* are passed \d+\.\d times"),
        ({"lora.alpha": 0}, "multiplies the adapter by nothing"),
    ],
)
def test_a_plan_that_cannot_work_is_doubted(
    make_config: MakeConfig, data: PreparedData, changes: dict[str, Any], sentence: str
) -> None:
    import re

    found = [line for line in said(make_config, data, **changes) if re.search(sentence, line)]
    assert len(found) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.lr": 1e-3, "training.max_steps": 60},  # examples/quickstart.yaml
        {"optimizer.lr": 2e-4, "training.max_steps": 200, "training.epochs": 200},
        {"optimizer.lr": 1e-5, "training.max_steps": 1000, "training.epochs": 400},
        {"optimizer.lr": 2e-4, "optimizer.lora_plus_ratio": 16.0},
        {"optimizer.lr": 2e-5, "lora.modules_to_save": ["embed_tokens"]},
        {"optimizer.warmup_steps": 5},
    ],
)
def test_what_works_is_not_doubted(make_config: MakeConfig, data: PreparedData, changes: dict[str, Any]) -> None:
    assert [line for line in said(make_config, data, **changes) if "beyond training.epochs" not in line] == []


def test_validation_rows_that_are_trained_on_are_counted(
    make_config: MakeConfig, tiny_data: Path, tiny_tokenizer: Any
) -> None:
    same = prepare(tiny_tokenizer, tiny_data, tiny_data)
    assert "24 of 24 validation rows are trained on as well" in said(make_config, same)[0]


def test_too_little_room_is_said_before_the_first_step(
    make_config: MakeConfig, data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5000}))
    (line,) = said(make_config, data)
    assert "has 5,000 bytes free and the run's checkpoints and adapter take about 13,000" in line
    assert said(make_config, data, **{"checkpoint.every_steps": 0, "eval.every_steps": None})[0] != line


def test_a_loss_that_rose_is_said_afterwards() -> None:
    rows = [{"step": n, "loss": loss} for n, loss in enumerate([3.9, 4.0, 20.0, 27.0, 27.0, 27.0, 27.0, 27.0])]
    (line,) = afterthoughts(rows)
    assert "the loss rose from 3.90 to 27.00" in line
    assert not afterthoughts([{"step": n, "loss": loss} for n, loss in enumerate([3.9, 3.0, 3.5, 2.0])])
    assert not afterthoughts([{"step": n, "loss": loss} for n, loss in enumerate([0.3, 0.2, 0.6, 0.7])])
    assert "last validation loss is nan" in afterthoughts([{"step": 1, "loss": 1.0, "eval_loss": "nan"}])[0]


def test_check_and_train_say_the_same(make_config: MakeConfig) -> None:
    path = make_config(**{"optimizer.lr": 1.0, "lora.targets": ["q_proj"], "training.max_steps": 3})
    lines: list[str] = []
    report = check(path)
    train(path, say=lines.append)
    assert len(report.doubts) == 1
    assert report.doubts[0] in lines
