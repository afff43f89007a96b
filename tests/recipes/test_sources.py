"""Sources in a run's config: what is refused and where, what is told, and a resumed run over a mixed set."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from entrenar.core.config import load_config, to_yaml
from entrenar.core.errors import InputError, StoppedError
from entrenar.files.peft import WEIGHTS_NAME
from entrenar.recipes.check import check
from entrenar.recipes.config import RunConfig
from entrenar.recipes.inputs import check_config
from entrenar.recipes.train import describe, train
from entrenar.training.state import StepReport

MakeConfig = Callable[..., Path]


@pytest.fixture
def few(tmp_path: Path) -> str:
    path = tmp_path / "few" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": f"Turn {n} degrees"}) + "\n" for n in range(6)))
    (path.parent / "NOTES.md").write_text("notes")
    return str(path.parent)


@pytest.mark.parametrize(
    "value",
    [
        "a.jsonl",
        ["a.jsonl", "rows/*.csv"],
        [{"path": "a.jsonl", "weight": 1.0}, {"path": "org/name", "weight": 0.5, "split": "dev", "revision": "v1"}],
        ["a.jsonl", {"path": "b", "rows": 20}],
    ],
)
def test_a_config_is_written_as_it_was_read(make_config: MakeConfig, value: Any) -> None:
    config = load_config(RunConfig, make_config(**{"data.train": value, "data.validation": value}, **_NO_SHARE))
    assert yaml.safe_load(to_yaml(config))["data"]["train"] == value
    assert config.model_dump()["data"]["validation"] == value


_NO_SHARE: dict[str, object] = {"data.validation_fraction": 0.0}


def test_one_entry_may_be_a_mapping_alone(make_config: MakeConfig) -> None:
    [source] = load_config(RunConfig, make_config(**{"data.train": {"path": "org/name", "split": "dev"}})).data.train
    assert (source.path, source.split, source.is_whole) == ("org/name", "dev", True)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([], r"'data\.train' is \[\] but it names no rows"),
        ([3], r"'data\.train' is \[3\] but it names no rows: allowed are a path"),
        (None, r"'data\.train' is None but it names no rows"),
        ("", r"'data\.train\.0\.path' is '' but string should have at least 1 character"),
        (
            [{"path": "a", "weight": 0}, {"path": "b", "weight": 0}],
            r"but every weight is 0, so there is nothing to read",
        ),
        ([{"path": "a", "weight": 1}, "b"], r"but b has neither weight nor rows beside entries with a weight"),
        ([{"path": "a", "weight": 1, "rows": 3}], r"but a has both a weight and a number of rows: keep one"),
        ([{"path": "a", "weight": -1}], r":\d+: 'data\.train\.0\.weight' is -1 but"),
        ([{"path": "a", "weight": float("inf")}], r"'data\.train\.0\.weight' is inf but"),
        (["b", {"path": "a", "rows": 0}], r":\d+: 'data\.train\.1\.rows' is 0 but"),
        ([{"path": "a", "rows": 10**12}], r"'data\.train\.0\.rows' is 1000000000000 but"),
        ([{"path": "a", "wieght": 1}], r":\d+: unknown key 'data\.train\.0\.wieght': did you mean 'weight'\?"),
        ([{"weight": 1}], r":\d+: required key 'data\.train\.0\.path' is missing"),
        ([{"path": "a", "revision": 1}], r"'data\.train\.0\.revision' is 1 but"),
    ],
)
def test_a_wrong_entry_is_one_sentence_with_its_line(make_config: MakeConfig, value: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        load_config(RunConfig, make_config(**{"data.train": value}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["absent.jsonl", ["rows/absent.jsonl"], {"path": "a/b/c"}, [{"path": "./absent"}]])
def test_a_file_that_is_not_there_is_told_before_anything_is_loaded(make_config: MakeConfig, value: Any) -> None:
    with pytest.raises(InputError, match=r"^data file \S+ does not exist: check the path$"):
        check_config(make_config(**{"data.train": value}))


def test_a_pattern_and_a_hub_id_are_looked_at_later(make_config: MakeConfig) -> None:
    check_config(make_config(**{"data.train": ["absent/*.jsonl", {"path": "org/name", "rows": 3}, 5]}))
    with pytest.raises(InputError, match=r"data 'org/name' is not a file, a directory or a hub dataset within reach"):
        check(make_config(**{"data.train": "org/name"}))


def test_what_each_entry_gave_is_told(make_config: MakeConfig, tiny_data: Path, few: str) -> None:
    mixed = [{"path": str(tiny_data), "rows": 10}, {"path": few, "rows": 8}]
    told = describe(check(make_config(**{"data.train": mixed}, **_NO_SHARE)).data)
    assert told == (
        f"{tiny_data}: prompt/completion rows, 10 of 24; {few}: text rows, 8 of 6; 18 to train on, "
        f"not read in {few}: NOTES.md"
    )
    plain = describe(check(make_config(**_NO_SHARE)).data)
    assert plain == f"{tiny_data}: prompt/completion rows, 24 to train on"
    aside = describe(check(make_config(**{"data.validation": mixed}, **_NO_SHARE)).data)
    assert f"24 to train on, 18 held out ({tiny_data}: prompt/completion rows, 10 of 24; {few}: text rows, 8" in aside


def _stop(report: StepReport) -> None:
    if report.step == 3:
        signal.raise_signal(signal.SIGTERM)


def test_a_run_over_a_mixed_set_resumes_to_the_same_bits(make_config: MakeConfig, tiny_data: Path, few: str) -> None:
    mixed = {"data.train": [{"path": str(tiny_data), "weight": 1}, {"path": few, "weight": 2.5}]}
    straight = train(make_config("straight", **mixed))
    config = make_config("stopped", **mixed)
    with pytest.raises(StoppedError):
        train(config, on_step=_stop)
    resumed = train(config)
    assert (resumed.resumed_from_step, resumed.steps) == (3, 6)
    one, other = (load_file(Path(run.adapter) / WEIGHTS_NAME) for run in (straight, resumed))
    assert all(one[name].equal(other[name]) for name in one)
    with pytest.raises(InputError, match=r"another run, which differs in data\.train"):
        train(make_config("stopped", **{"data.train": [str(tiny_data), few]}))
