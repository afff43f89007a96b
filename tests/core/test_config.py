"""Strict configs: every mistake is reported at once, in a sentence with its line."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from entrenar.core.config import Section, load_config, parse_override, to_yaml
from entrenar.core.errors import InputError


class Model(Section):
    path: str
    layers: int = 2


class Optimizer(Section):
    lr: float = Field(default=1e-3, gt=0)
    name: Literal["adamw", "sgd"] = "adamw"
    betas: list[float] = Field(default=[0.9, 0.95])

    @field_validator("betas")
    @classmethod
    def _two(cls, value: list[float]) -> list[float]:
        if len(value) != 2:
            raise ValueError(f"needs 2 numbers, has {len(value)}")
        return value


class Log(Section):
    every: int | None = None


class Config(Section):
    model: Model
    optimizer: Optimizer = Optimizer()
    log: Log | None = None


def read(directory: Path, text: str, overrides: dict[str, Any] | None = None) -> Config:
    path = directory / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Config, path, overrides)


def problems(directory: Path, text: str, overrides: dict[str, Any] | None = None) -> list[str]:
    """The lines of the error, without the directory."""
    with pytest.raises(InputError) as caught:
        read(directory, text, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{directory}/", "").splitlines()


def test_values_are_read_and_absent_ones_take_their_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, "model: {path: m, layers: 3}\noptimizer:\n  name: sgd\n")
    assert config == Config(model=Model(path="m", layers=3), optimizer=Optimizer(name="sgd"))
    assert config.optimizer.lr == 1e-3


@pytest.mark.parametrize("spelling", ["2e-4", "0.0002", "2E-4", "+2e-4", "2.0e-4", "2.e-4", ".2e-3", "20e-5", "2e-04"])
def test_every_spelling_of_a_number_is_that_number(tmp_path: Path, spelling: str) -> None:
    assert read(tmp_path, f"model: {{path: m}}\noptimizer: {{lr: {spelling}}}").optimizer.lr == 0.0002
    assert parse_override(f"optimizer.lr={spelling}") == ("optimizer.lr", 0.0002)


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=100, deadline=None)
def test_a_float_as_python_writes_it_reads_back_to_the_last_bit(value: float) -> None:
    assert parse_override(f"key={value!r}") == ("key", value)


@pytest.mark.parametrize("text", ["e5", "1e", "2e-4x", "1.2.3", "12-4", "--2e-4", "e-4"])
def test_text_that_only_resembles_a_number_stays_text(text: str) -> None:
    assert parse_override(f"key={text}") == ("key", text)


def test_an_integer_is_a_float_where_a_float_is_wanted(tmp_path: Path) -> None:
    assert read(tmp_path, "model: {path: m}\noptimizer: {lr: 1}").optimizer.lr == 1.0


def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_known_key(tmp_path: Path) -> None:
    assert problems(tmp_path, "model:\n  path: m\n\n  layerz: 3\n") == [
        "config.yaml:4: unknown key 'model.layerz': did you mean 'layers'?"
    ]


def test_a_misspelt_section_is_named_too(tmp_path: Path) -> None:
    found = problems(tmp_path, "model: {path: m}\noptimiser: {lr: 1}\n")
    assert found == ["config.yaml:2: unknown key 'optimiser': did you mean 'optimizer'?"]


def test_a_key_like_no_other_lists_the_known_ones(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "model: {path: m, wheels: 4}")
    assert found.startswith("config.yaml:1: unknown key 'model.wheels'")
    assert "path, layers" in found
    assert "did you mean" not in found


def test_an_unknown_key_below_an_optional_section_is_compared_with_that_section(tmp_path: Path) -> None:
    assert problems(tmp_path, "model: {path: m}\nlog:\n  evry: 3\n") == [
        "config.yaml:3: unknown key 'log.evry': did you mean 'every'?"
    ]


def test_all_errors_are_reported_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = "model:\n  layers: two\noptimizer:\n  lr: big\n  nome: sgd\nextra: 1\n"
    found = problems(tmp_path, text)
    assert len(found) == 5
    for line, key in ((1, "model.path"), (2, "model.layers"), (4, "optimizer.lr"), (5, "optimizer.nome"), (6, "extra")):
        assert any(f"config.yaml:{line}:" in sentence and f"'{key}'" in sentence for sentence in found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.layers", "3.0"),
        ("model.layers", "'3'"),
        ("model.layers", "1e3"),
        ("model.path", "12"),
        ("optimizer.lr", "'2e-4'"),
        ("optimizer.lr", "[1]"),
        ("optimizer.lr", "-1"),
        ("optimizer.name", "lion"),
        ("optimizer.betas", "0.9"),
        ("log.every", "often"),
        ("log", "3"),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error_that_shows_it(tmp_path: Path, key: str, value: str) -> None:
    (found,) = problems(tmp_path, yaml.safe_dump({"model": {"path": "m"}}), dict([parse_override(f"{key}={value}")]))
    shown = parse_override(f"x={value}")[1]
    assert f"'{key}' is {shown!r} but " in found


def test_a_literal_names_what_is_allowed(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "model: {path: m}\noptimizer: {name: lion}")
    assert "'adamw'" in found
    assert "'sgd'" in found


def test_the_owner_of_a_section_may_refuse_in_its_own_words(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "model: {path: m}\noptimizer:\n  betas: [0.9]")
    assert found == "config.yaml:3: 'optimizer.betas' is [0.9] but needs 2 numbers, has 1"


def test_a_missing_required_key_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, "log: {}\nmodel:\n  layers: 1") == ["config.yaml:2: required key 'model.path' is missing"]


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "true"])
def test_a_bare_yes_or_no_where_text_is_wanted_gets_a_hint_about_quotes(tmp_path: Path, word: str) -> None:
    (found,) = problems(tmp_path, f"model: {{path: {word}}}")
    assert "put it in quotes" in found
    assert read(tmp_path, f"model: {{path: '{word}'}}").model.path == word


def test_a_key_written_twice_names_both_lines(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "model:\n  path: a\n  layers: 1\n  path: b\n")
    assert found.startswith("config.yaml:4: key 'model.path' is written twice (first on line 2)")


def test_a_section_written_twice_names_both_lines(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, "model: {path: a}\nlog: {}\nmodel: {path: b}\n")
    assert found.startswith("config.yaml:3: key 'model' is written twice (first on line 1)")


def test_an_override_wins_over_the_file_and_may_open_a_section(tmp_path: Path) -> None:
    text = "model: {path: m, layers: 3}"
    config = read(tmp_path, text, {"model.layers": 5, "log.every": 7})
    assert config == Config(model=Model(path="m", layers=5), log=Log(every=7))
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == text


def test_an_override_is_as_strict_as_the_file(tmp_path: Path) -> None:
    found = problems(tmp_path, "model: {path: m}", {"model.layer": 5, "optimizer.lr": "fast"})
    assert len(found) == 2
    assert any("unknown key 'model.layer': did you mean 'layers'?" in sentence for sentence in found)
    assert any("'optimizer.lr' is 'fast'" in sentence for sentence in found)


@pytest.mark.parametrize("text", ["lr", "=3", "a..b=1", "a b=1", ".a=1", "a.=1", ""])
def test_an_override_that_is_not_key_equals_value_shows_how_to_write_one(text: str) -> None:
    with pytest.raises(InputError, match=r"section\.key=value") as caught:
        parse_override(text)
    assert repr(text) in str(caught.value)


def test_an_override_whose_value_is_broken_yaml_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"'a\.b=\[1'"):
        parse_override("a.b=[1")


@pytest.mark.parametrize(
    ("text", "value"),
    [("k=", None), ("k=a=b", "a=b"), ("k=[1, 2e-4]", [1, 0.0002]), ("k=true", True), ("k='1'", "1"), ("k=x y", "x y")],
)
def test_an_override_value_is_yaml(text: str, value: object) -> None:
    assert parse_override(text) == ("k", value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must be a mapping"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"just text", "must be a mapping"),
        (b"model: [1\n", "is not YAML"),
        (b"model: {path: a}\n---\nlog: {}\n", "is not YAML"),
        (b"? [a]\n: 1\n", "is not YAML"),
        (b"model: {path: \xff\xfe}\n", "is not UTF-8 text"),
        (b"a: &a\n  b: *a\n", "nests without end"),
    ],
)
def test_a_file_that_is_no_config_is_named_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        load_config(Config, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_config(Config, tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="is a directory, not a file"):
        load_config(Config, tmp_path)


def test_a_tag_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (found,) = problems(tmp_path, f"model: !!python/object/apply:os.mkdir ['{mark}']")
    assert "is not YAML" in found
    assert not mark.exists()


def test_a_config_cannot_be_changed(tmp_path: Path) -> None:
    config = read(tmp_path, "model: {path: m}")
    with pytest.raises(ValidationError, match="frozen"):
        config.model = Model(path="other")


@given(
    path=st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20),
    layers=st.integers(),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    every=st.none() | st.integers(),
)
@settings(max_examples=50, deadline=None)
def test_a_written_config_reads_back_as_itself(
    tmp_path_factory: pytest.TempPathFactory, path: str, layers: int, lr: float, every: int | None
) -> None:
    config = Config(model=Model(path=path, layers=layers), optimizer=Optimizer(lr=lr), log=Log(every=every))
    assert read(tmp_path_factory.mktemp("config"), to_yaml(config)) == config


def test_a_written_config_keeps_the_declared_order() -> None:
    lines = to_yaml(Config(model=Model(path="m"))).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["model:", "optimizer:", "log: null"]


@pytest.mark.parametrize(
    "value", ["0x_", "0b_", "!!int ''", "!!float abc", "2026-02-31", "? [1]\n: 2", "!!timestamp x"]
)
def test_a_scalar_that_yaml_itself_trips_over_is_a_sentence(tmp_path: Path, value: str) -> None:
    assert "config.yaml is not YAML" in problems(tmp_path, f"model: {{path: m}}\nlog:\n  {value}\n")[0]


def test_aliases_that_multiply_are_refused_before_they_are_written_out(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "more than 200,000 values" in problems(tmp_path, "\n".join(lines))[0]


@pytest.mark.parametrize("path", ["0E0", "1e5", "-2.e-3", ".5e1"])
def test_a_path_that_looks_like_a_number_is_written_in_quotes(tmp_path: Path, path: str) -> None:
    config = Config(model=Model(path=path))
    assert read(tmp_path, to_yaml(config)) == config
