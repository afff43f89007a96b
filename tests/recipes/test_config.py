"""Every bound of a run's config is a sentence; nothing that a YAML file can hold is a traceback."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.core.config import load_config, parse_override
from entrenar.core.errors import InputError
from entrenar.recipes.config import RunConfig

MakeConfig = Callable[..., Path]
LONGEST = 500


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", float("inf")), ("optimizer.lr", float("nan")), ("optimizer.lr", 0), ("optimizer.lr", -1e-4),
        ("optimizer.eps", 1e-50), ("optimizer.eps", 0), ("optimizer.weight_decay", float("inf")),
        ("optimizer.max_grad_norm", float("nan")), ("optimizer.lora_plus_ratio", float("inf")),
        ("lora.alpha", float("inf")), ("lora.alpha_pattern", {"q_proj": float("nan")}),
        ("training.seed", 2**63), ("training.seed", 19_000_000_000_000), ("training.seed", -1),
        ("training.epochs", 10**30), ("training.batch_size", 2**31), ("training.memory", "9" * 400 + "GB"),
        ("training.memory", "1" + "0" * 19 + "GB"), ("training.memory", "²GB"), ("training.memory", 2**80),
        ("data.date", "2026-02-30"), ("data.date", "today"), ("data.date", datetime.datetime(2026, 11, 30, 1)),
        ("data.date", 20261130), ("data.max_length", 2**40), ("checkpoint.keep", 0), ("lora.rank", True),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_named(make_config: MakeConfig, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{key}\b.* but ") as caught:
        load_config(RunConfig, make_config(**{key: value}))
    assert len(str(caught.value)) < LONGEST


@pytest.mark.parametrize("value", ["2026-11-30", datetime.date(2026, 11, 30)])
def test_a_date_may_be_written_bare(make_config: MakeConfig, value: object) -> None:
    assert load_config(RunConfig, make_config(**{"data.date": value})).data.date == "2026-11-30"


def test_the_largest_seed_is_taken(make_config: MakeConfig) -> None:
    assert load_config(RunConfig, make_config(**{"training.seed": 2**32 - 1})).training.seed == 2**32 - 1


def test_a_huge_number_or_text_is_cut_in_the_sentence(make_config: MakeConfig) -> None:
    for value in ("0x" + "f" * 9000, "'" + "y" * 9000 + "'", "[" + "1, " * 900 + "1]"):
        with pytest.raises(InputError, match=r"lora\.rank") as caught:
            load_config(RunConfig, make_config(), dict([parse_override(f"lora.rank={value}")]))
        assert len(str(caught.value)) < LONGEST


def test_an_override_may_be_written_as_an_option() -> None:
    assert parse_override("--optimizer.lr=1e-3") == ("optimizer.lr", 1e-3)


SCALARS = (
    "0x_", "0b_", "!!int ''", "!!float abc", "2026-02-31", "2026-11-30 12:00:00", "!!binary aGk=", "!!set {a, b}",
    "!!omap [a: 1]", "~", ".inf", ".nan", "9" * 5000, "&a [*a]", "*a", "<<: *x", "? [a, b] : c", "\x00", "\x1b[31m",
    "[[" * 600, "{a: " * 600, "{1: 2}", "{null: 3}", "{[a]: 3}", "{2026-01-01: 3}", "=", "|\n  a", "- a", "%YAML 9.9",
    "---", "0o9", "1:30", "!!pairs [a: b]", "!!python/object:os.system x", "{!!binary aGk=: 1}", "true: 1", "",
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2), st.sampled_from(SCALARS)), max_size=3))
def test_a_mutated_file_is_read_or_told(make_config: MakeConfig, tmp_path: Path, changes: list[Any]) -> None:
    """Lines get other values, other keys, or are replaced whole."""
    lines = yaml.safe_dump(yaml.safe_load(make_config().read_text())).split("\n")
    for number, kind, scalar in changes:
        key, colon, value = lines[number % len(lines)].partition(":")
        lines[number % len(lines)] = (f"{key}: {scalar}", f"{scalar}{colon}{value}", scalar)[kind]
    path = tmp_path / "mutated.yaml"
    path.write_text("\n".join(lines))
    try:
        load_config(RunConfig, path)
    except InputError as error:
        assert all(len(line) < 2 * LONGEST for line in str(error).split("\n"))
