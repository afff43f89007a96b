"""What an adapter's config names, by peft's rules; and what its file then has to have."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from entrenar.core.errors import InputError
from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.lora.matching import allowed, in_layers, named_by, saved_whole

NAMES = [
    "model.embed_tokens", "model.layers.0.q_proj", "model.layers.0.mlp.gate", "model.layers.1.q_proj",
    "model.layers.1.experts.0.q_proj", "model.layers.1.post_norm", "model.norm", "lm_head",
]  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj"], [1, 3, 4]),
        (["proj"], []),
        (["mlp.gate", "lm_head"], [2, 7]),
        ("q_proj", []),
        (r".*\.1\..*q_proj", [3, 4]),
        (r"model\.layers\.0", []),
    ],
)
def test_targets_are_whole_words_at_the_end_or_an_expression_for_all(targets: Any, named: list[int]) -> None:
    assert named_by(NAMES, targets) == [NAMES[i] for i in named]


@pytest.mark.parametrize(
    ("layers", "pattern", "named"),
    [
        (None, None, range(8)),
        ([], None, range(8)),
        (1, None, [3, 4, 5]),
        ([0], None, [1, 2]),
        ([1], "layers", [3, 4, 5]),
        ([0], ["experts"], [4]),
        ([0], "blocks", []),
    ],
)
def test_layers_are_the_first_number_of_a_path(layers: Any, pattern: Any, named: Any) -> None:
    assert in_layers(NAMES, layers, pattern) == [NAMES[i] for i in named]


def test_excluded_is_matched_as_targets_are_and_what_is_trained_whole_by_whole_words() -> None:
    assert allowed(NAMES, ["gate", "lm_head"], []) == [n for i, n in enumerate(NAMES) if i not in (2, 7)]
    assert allowed(NAMES, r".*\.1\..*", []) == [NAMES[i] for i in (0, 1, 2, 6, 7)]
    assert allowed(NAMES, [], ["mlp", "norm"]) == [NAMES[i] for i in (0, 1, 3, 4, 5, 7)]


def test_trained_whole_is_any_end_of_a_path_and_nothing_within() -> None:
    assert saved_whole(NAMES, ["norm"]) == ["model.layers.1.post_norm", "model.norm"]
    assert saved_whole(["a", "a.mlp", "a.mlp.x_mlp"], ["mlp"]) == ["a.mlp"]


def test_a_target_that_is_no_expression_is_named() -> None:
    with pytest.raises(InputError, match=r"LoRA target '\(' is not a regular expression"):
        named_by(NAMES, "(")


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(OrderedDict(up=nn.Linear(8, 8), gate=nn.Linear(8, 1), norm=nn.LayerNorm(8))) for _ in "ab"]
    return nn.Sequential(OrderedDict(a=layers[0], b=layers[1]))


def saved(path: Path, **options: Any) -> Path:
    model = stack()
    attach_lora(model, rank=2, **options)
    save_adapter(model, path)
    return path


def edited(path: Path, drop: str = "", **config: Any) -> Path:
    """The adapter without the tensors whose key has `drop`, its config changed."""
    file = path / "adapter_model.safetensors"
    if drop:
        save_file({key: t for key, t in load_file(file).items() if drop not in key}, file)
    values = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    (path / "adapter_config.json").write_text(json.dumps(values | config), encoding="utf-8")
    return path


@pytest.mark.parametrize("targets", [["up"], "all-linear", r"(a|b)\.up"])
def test_a_layer_that_the_config_names_and_the_file_lacks_is_named(tmp_path: Path, targets: Any) -> None:
    path = edited(saved(tmp_path / "adapter", targets=targets), drop=".b.up.", target_modules=targets)
    with pytest.raises(InputError, match=r"no factors for 1 layers .*: b\.up$"):
        load_adapter(stack(), path)


def test_a_layer_that_the_file_has_beyond_its_config_is_named(tmp_path: Path) -> None:
    path = edited(saved(tmp_path / "adapter", targets=["up"]), target_modules=["a.up"])
    with pytest.raises(InputError, match=r"factors for 1 layers that its config does not name.*: b\.up;"):
        load_adapter(stack(), path)


@pytest.mark.parametrize(
    ("options", "drop"), [({"modules_to_save": ["norm"]}, ".b.norm."), ({"bias": "all"}, ".b.up.base_layer.bias")]
)
def test_what_is_trained_whole_and_the_file_lacks_is_named(tmp_path: Path, options: Any, drop: str) -> None:
    path = edited(saved(tmp_path / "adapter", targets=["up"], **options), drop=drop)
    with pytest.raises(InputError, match=r"do not train the same parameters whole: b\."):
        load_adapter(stack(), path)


def test_factors_of_another_rank_than_the_configs_are_refused(tmp_path: Path) -> None:
    path = edited(saved(tmp_path / "adapter", targets=["up"]), r=4)
    with pytest.raises(InputError, match=r"shapes \(2, 8\) and \(8, 2\) at .*\.up, .*rank 4"):
        load_adapter(stack(), path)


def test_excluded_layers_are_left_out_and_stay_so_on_disk(tmp_path: Path) -> None:
    model = stack()
    assert attach_lora(model, rank=2, exclude=["gate"]) == ["a.up", "b.up"]
    save_adapter(model, tmp_path / "adapter")
    again = stack()
    load_adapter(again, tmp_path / "adapter")
    assert [name for name, _ in adapted_layers(again)] == ["a.up", "b.up"]
    path = edited(tmp_path / "adapter", target_modules=["up", "gate"], exclude_modules=r".*gate")
    load_adapter(again := stack(), path)
    assert [name for name, _ in adapted_layers(again)] == ["a.up", "b.up"]
    with pytest.raises(InputError, match="every LoRA target is excluded"):
        attach_lora(stack(), rank=2, targets=["up"], exclude=["up"])


def test_a_gate_of_one_row_takes_the_rank_of_the_others() -> None:
    """As in peft, whose A and B then have the rank that is asked for."""
    model = stack()
    assert len(attach_lora(model, rank=4)) == 4
    shapes = {tuple(layer.lora_b.shape) for name, layer in adapted_layers(model) if name.endswith("gate")}
    assert shapes == {(1, 4)}
