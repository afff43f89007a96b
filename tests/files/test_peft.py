"""PEFT adapter directories: what is not understood is an error, never skipped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.files.peft import (
    AdapterTensors,
    BaseFormat,
    PeftAdapter,
    read_adapter,
    read_base_format,
    read_tensors,
    write_adapter,
)

PREFIX = "base_model.model."
LAYER = "model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "lora_dropout": 0.5}


def pair(layer: str = LAYER, prefix: str = PREFIX) -> dict[str, Tensor]:
    """A and B of a layer under PEFT's keys."""
    return {
        f"{prefix}{layer}.lora_A.weight": torch.arange(6.0).view(2, 3),
        f"{prefix}{layer}.lora_B.weight": torch.arange(8.0).view(4, 2),
    }


def directory(root: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """An adapter directory as peft writes it, with some of its config changed."""
    root.mkdir(exist_ok=True)
    (root / "adapter_config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    save_file(pair() if tensors is None else tensors, root / "adapter_model.safetensors")
    return root


def refusal(path: Path) -> str:
    """What reading the directory says; always bad input, and where."""
    with pytest.raises(InputError) as caught:
        read_adapter(path)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)
    return str(caught.value)


def adapter(count: int, rank: int, base_format: BaseFormat | None = None) -> PeftAdapter:
    layers = {
        f"model.layers.{n}.up": {"lora_A.weight": torch.randn(rank, 5), "lora_B.weight": torch.randn(7, rank)}
        for n in range(count)
    }
    return PeftAdapter(
        rank=rank, alpha=2.5, dropout=0.1, targets=["up"], base_model="base", base_format=base_format,
        tensors=AdapterTensors(layers),
    )  # fmt: skip


BASE_FORMATS = st.none() | st.builds(
    BaseFormat,
    format=st.sampled_from(["nf4", "int4"]),
    block_size=st.sampled_from([64, 128]),
    double_quant=st.booleans(),
)


@given(count=st.integers(1, 4), rank=st.integers(1, 5), base_format=BASE_FORMATS)
@settings(max_examples=20, deadline=None)
def test_a_written_adapter_reads_back_as_itself(
    tmp_path_factory: pytest.TempPathFactory, count: int, rank: int, base_format: BaseFormat | None
) -> None:
    path = tmp_path_factory.mktemp("peft") / "adapter"
    written = adapter(count, rank, base_format)
    write_adapter(path, written)
    found = read_adapter(path)
    assert (found.rank, found.alpha, found.dropout) == (rank, 2.5, 0.1)
    assert (found.targets, found.base_model, found.base_format) == (["up"], "base", base_format)
    assert read_base_format(path) == base_format
    assert found.factors.keys() == written.factors.keys()
    for layer, factors in written.factors.items():
        assert all(torch.equal(*both) for both in zip(found.factors[layer], factors, strict=True))


def test_a_directory_as_peft_writes_it_is_read(tmp_path: Path) -> None:
    found = read_adapter(directory(tmp_path, target_modules=".*q_proj", base_model_name_or_path=None))
    assert (found.rank, found.alpha, found.dropout) == (2, 4.0, 0.5)
    assert (found.targets, found.base_model, found.base_format) == (".*q_proj", None, None)
    a, b = found.factors[LAYER]
    assert torch.equal(a, torch.arange(6.0).view(2, 3))
    assert torch.equal(b, torch.arange(8.0).view(4, 2))


def test_factors_that_are_views_are_written_as_their_values(tmp_path: Path) -> None:
    written = adapter(1, 2)
    square = torch.arange(36.0).view(6, 6)
    written.tensors.layers["strided"] = {"lora_A.weight": square.t()[:2], "lora_B.weight": square[:, ::3]}
    write_adapter(tmp_path / "adapter", written)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(stored[f"{PREFIX}strided.lora_A.weight"], square.t()[:2])
    assert torch.equal(stored[f"{PREFIX}strided.lora_B.weight"], square[:, ::3])


def test_an_existing_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"old")
    with pytest.raises(InputError, match="already exists"):
        write_adapter(tmp_path, adapter(1, 1))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("mine", b"old")]


@pytest.mark.parametrize(
    "key",
    [
        f"{LAYER}.lora_A.weight",
        f"model.{LAYER}.lora_A.weight",
        f"{PREFIX}{LAYER}.lora_A.default.weight",
        f"{PREFIX}{LAYER}.lora_C.weight",
        f"{PREFIX}{LAYER}.lora_magnitude_vector.weight",
        f"{PREFIX}{LAYER}.base_layer.bias",
        f"{PREFIX}{LAYER}.lora_B.bias",
        f"{PREFIX}{LAYER}.lora_A.weight.absmax",
        f"{PREFIX}model.norm.weight",
        f"{PREFIX}lora_A.weight",
    ],
)
def test_a_key_that_is_not_understood_is_named(tmp_path: Path, key: str) -> None:
    assert key in refusal(directory(tmp_path, pair() | {key: torch.ones(2, 3)}))


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_missing_half_names_its_layer(tmp_path: Path, letter: str) -> None:
    tensors = pair() | pair("model.layers.1.self_attn.q_proj")
    del tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_{letter}.weight"]
    message = refusal(directory(tmp_path, tensors))
    assert "only one of lora_A and lora_B for model.layers.1.self_attn.q_proj" in message


def test_an_adapter_without_tensors_is_an_error(tmp_path: Path) -> None:
    assert "no tensors" in refusal(directory(tmp_path, {}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
        ("use_bdlora", {"target_modules_bd_a": ["q"]}),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    message = refusal(directory(tmp_path, **{key: value}))
    assert f"{key} = {value!r}" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "some"),
        ("rank_pattern", [4]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "4"}),
        ("modules_to_save", "lm_head"),
        ("target_modules", [3]),
        ("lora_dropout", 1.5),
        ("layers_to_transform", [-1]),
        ("trainable_token_indices", {"embed_tokens": [2.5]}),
        ("use_rslora", "yes"),
        ("base_model_name_or_path", {"a": 1}),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(tmp_path: Path, key: str, value: Any) -> None:
    assert f"'{key}" in refusal(directory(tmp_path, **{key: value}))


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    assert "has lora_gamma, which" in refusal(directory(tmp_path, lora_gamma=3))


def test_every_field_of_a_variant_is_read(tmp_path: Path) -> None:
    tensors = pair() | {f"{PREFIX}{LAYER}.lora_magnitude_vector": torch.ones(4)}
    tensors |= {f"{PREFIX}lm_head.weight": torch.ones(3, 2), f"{PREFIX}{LAYER}.base_layer.bias": torch.ones(4)}
    found = read_adapter(
        directory(
            tmp_path, tensors, use_dora=True, use_rslora=True, bias="lora_only", rank_pattern={"q_proj": 2},
            alpha_pattern={"q_proj": 3}, modules_to_save=["lm_head"],
        )
    )  # fmt: skip
    assert (found.dora, found.rslora, found.bias, found.modules_to_save) == (True, True, "lora_only", ["lm_head"])
    assert (found.rank_pattern, found.alpha_pattern) == ({"q_proj": 2}, {"q_proj": 3})
    assert found.tensors.layers[LAYER].keys() == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    assert found.tensors.saved.keys() == {"lm_head.weight", f"{LAYER}.bias"}
    assert not found.is_plain


@pytest.mark.parametrize("dora", [True, False])
def test_a_magnitude_must_be_there_exactly_when_the_config_says_dora(tmp_path: Path, dora: bool) -> None:
    extra = {} if dora else {f"{PREFIX}{LAYER}.lora_magnitude_vector": torch.ones(4)}
    assert f"use_dora = {dora}" in refusal(directory(tmp_path, pair() | extra, use_dora=dora))


@pytest.mark.parametrize("name", [f"{LAYER}.weight", f"{LAYER.rpartition('.')[2]}.weight"])
def test_a_parameter_of_a_plain_layer_is_refused_for_what_it_is(tmp_path: Path, name: str) -> None:
    told = refusal(directory(tmp_path, target_modules=None, target_parameters=[name]))
    assert f"adapts {name} as a parameter (target_parameters)" in told
    assert f"train {LAYER} as a layer (target_modules)" in told


def test_loftq_without_what_it_took_is_refused(tmp_path: Path) -> None:
    assert "loftq" in refusal(directory(tmp_path, init_lora_weights="loftq"))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_is_read(tmp_path: Path, init: bool | str) -> None:
    assert read_adapter(directory(tmp_path, init_lora_weights=init)).rank == 2


@pytest.mark.parametrize(("key", "value"), [("use_dora", None), ("rank_pattern", {}), ("modules_to_save", [])])
def test_an_option_that_is_switched_off_in_any_way_is_read(tmp_path: Path, key: str, value: Any) -> None:
    assert read_adapter(directory(tmp_path, **{key: value})).rank == 2


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "PREFIX_TUNING", None])
def test_another_kind_of_adapter_is_refused_by_name(tmp_path: Path, kind: str | None) -> None:
    assert f"{kind} adapter: only LORA" in refusal(directory(tmp_path, peft_type=kind))


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_config_that_lacks_a_key_names_it(tmp_path: Path, key: str) -> None:
    directory(tmp_path)
    rest = {name: value for name, value in CONFIG.items() if name != key}
    (tmp_path / "adapter_config.json").write_text(json.dumps(rest), encoding="utf-8")
    assert f"lacks {key}:" in refusal(tmp_path)


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", None])
def test_a_rank_that_is_no_rank_is_shown(tmp_path: Path, rank: Any) -> None:
    assert f"'r' is {rank!r} but" in refusal(directory(tmp_path, r=rank))


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", "big"), ("lora_alpha", None), ("lora_dropout", "none")])
def test_a_number_that_is_no_number_is_named(tmp_path: Path, key: str, value: Any) -> None:
    assert key in refusal(directory(tmp_path, **{key: value}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'"text"'])
def test_a_config_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    directory(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(content)
    assert "adapter_config.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (directory(tmp_path) / name).unlink()
    assert f"{name} does not exist" in refusal(tmp_path)


@given(st.integers(0, 400))
@settings(max_examples=25, deadline=None)
def test_a_file_cut_anywhere_is_an_error(tmp_path_factory: pytest.TempPathFactory, keep: int) -> None:
    path = directory(tmp_path_factory.mktemp("peft"))
    file = path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: min(keep, len(whole) - 1)])
    assert "not a complete safetensors file" in refusal(path)


def test_broken_metadata_is_an_error(tmp_path: Path) -> None:
    path = directory(tmp_path)
    for note in ("{", "[]", '{"format": "nf4"}'):
        save_file(pair(), path / "adapter_model.safetensors", metadata={"entrenar.base_format": note})
        assert "broken metadata" in refusal(path)


def test_factors_can_be_read_without_a_config(tmp_path: Path) -> None:
    save_file(pair("a") | pair("b.c"), tmp_path / "factors.safetensors")
    assert set(read_tensors(tmp_path / "factors.safetensors").layers) == {"a", "b.c"}


@pytest.mark.parametrize("value", [None, False, "", [], {}, [None], {"a": None, "b": False}])
@pytest.mark.parametrize("key", ["of_a_later_peft", "merge_weights", "lora_bias", "layer_replication", "kasa_config"])
def test_a_field_that_says_nothing_is_passed_over(tmp_path: Path, key: str, value: Any) -> None:
    assert read_adapter(directory(tmp_path, **{key: value})).rank == 2


@pytest.mark.parametrize("value", [True, 1, "x", [1], {"a": 1}])
def test_an_unknown_field_that_says_something_is_named(tmp_path: Path, value: Any) -> None:
    assert "has of_a_later_peft, which" in refusal(directory(tmp_path, of_a_later_peft=value))


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_factors_that_are_no_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = pair()
    key = f"{PREFIX}{LAYER}.lora_B.weight"
    tensors[key] = tensors[key].to(dtype)
    message = refusal(directory(tmp_path, tensors))
    assert key in message
    assert str(dtype) in message


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_factors_of_other_floats_keep_their_values(tmp_path: Path, dtype: torch.dtype) -> None:
    found = read_adapter(directory(tmp_path, {key: t.to(dtype) for key, t in pair().items()}))
    a, b = found.factors[LAYER]
    assert torch.equal(a.float(), torch.arange(6.0).view(2, 3))
    assert torch.equal(b.float(), torch.arange(8.0).view(4, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_factors_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    tensors = pair()
    tensors[f"{PREFIX}{LAYER}.lora_A.weight"][1, 1] = value
    assert "NaN or infinite" in refusal(directory(tmp_path, tensors))


@pytest.mark.parametrize("shape", [(0,), (6,), (2, 0), (1, 2, 3)])
def test_factors_that_are_no_matrices_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = pair() | {f"{PREFIX}{LAYER}.lora_A.weight": torch.zeros(shape)}
    assert str(shape) in refusal(directory(tmp_path, tensors))


def test_a_config_of_brackets_is_refused(tmp_path: Path) -> None:
    directory(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"[" * 100_000)
    assert "adapter_config.json" in refusal(tmp_path)


def test_a_module_to_save_is_the_end_of_a_path_without_a_dot(tmp_path: Path) -> None:
    key = "model.layers.0.post_attention_layernorm.weight"
    found = read_adapter(directory(tmp_path, pair() | {f"{PREFIX}{key}": torch.ones(3)}, modules_to_save=["norm"]))
    assert found.tensors.saved.keys() == {key}


def test_the_copies_that_peft_writes_twice_must_agree(tmp_path: Path) -> None:
    saved = {f"{PREFIX}lm_head{end}": torch.ones(3, 2) for end in (".weight", ".modules_to_save.weight")}
    saved[f"{PREFIX}lm_head.original_module.weight"] = torch.zeros(3, 2)
    found = read_adapter(directory(tmp_path, pair() | saved, modules_to_save=["lm_head"]))
    assert torch.equal(found.tensors.saved["lm_head.weight"], torch.ones(3, 2))
    assert torch.equal(found.tensors.base["lm_head.weight"], torch.zeros(3, 2))
    saved[f"{PREFIX}lm_head.modules_to_save.weight"] = torch.zeros(3, 2)
    assert "lm_head.weight twice" in refusal(directory(tmp_path, pair() | saved, modules_to_save=["lm_head"]))
