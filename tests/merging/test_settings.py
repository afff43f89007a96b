"""Scalars, gradients, filters, and which level counts."""

import pytest

from entrenar.core.errors import InputError
from entrenar.merging.registry import METHODS
from entrenar.merging.settings import Level, options_for

Q, MLP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("setting", "position", "expected"),
    [
        (0.5, 0.9, 0.5), ([0, 1], 0.25, 0.25), ([0, 1, 5], 0.5, 1), ([0, 1, 5], 0.75, 3), ([0, 1, 5], 1, 5),
        ([7], 0.3, 7),
        ([{"value": [0, 10]}], 0.3, 3),
    ],
)  # fmt: skip
def test_a_gradient_is_read_between_its_entries(setting: object, position: float, expected: float) -> None:
    assert Level("here", {"t": setting}).find("t", Q, position) == pytest.approx(expected)


def test_the_first_filter_that_matches_counts() -> None:
    level = Level(
        "here", {"t": [{"filter": "self_attn", "value": 1}, {"filter": "mlp", "value": [2, 4]}, {"value": 3}]}
    )
    assert [level.find("t", name, 1.0) for name in (Q, MLP, "model.norm.weight")] == [1, 4, 3]
    level.check_filters()


def test_a_filter_that_decides_for_nothing_is_an_error() -> None:
    level = Level("parameters", {"t": [{"filter": "mpl", "value": 1}, {"value": 3}]})
    level.find("t", MLP, 0)
    with pytest.raises(InputError, match="parameters: the filter 'mpl' of 't' decides for no tensor"):
        level.check_filters()


def test_the_nearest_level_counts_and_a_filter_without_match_asks_the_next() -> None:
    far, near = (
        Level("far", {"weight": 1.0, "density": 0.5}),
        Level("near", {"weight": [{"filter": "mlp", "value": 2}]}),
    )
    options = [options_for(METHODS["ties"], name, 0.0, [far], [[near, far]]) for name in (MLP, Q)]
    assert [option["weight"] for option in options] == [(2.0,), (1.0,)]
    assert options[0]["density"] == (0.5,)
    assert options[0]["lambda"] == 1.0


def test_what_is_required_must_be_given() -> None:
    with pytest.raises(InputError, match=r"ties needs the parameter 'weight' for model 2 \(models.1.parameters\)"):
        options_for(
            METHODS["ties"],
            Q,
            0,
            [],
            [[Level("models.0.parameters", {"weight": 1})], [Level("models.1.parameters", {})]],
        )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"wieght": 1}, r"here: ties does not read the parameter 'wieght' \(did you mean 'weight'\?\)"),
        ({"weight": []}, "'weight' is an empty list"),
        ({"weight": [{"filter": "mlp"}]}, "it has `value` and may have `filter`"),
        ({"weight": [1, {"value": 2}]}, "mixes plain values and entries with filters"),
    ],
)
def test_a_parameter_that_cannot_be_read_is_told(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Level("here", values).check(METHODS["ties"])
