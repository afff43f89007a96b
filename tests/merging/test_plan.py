"""What is decided from headers alone: inputs, layers, dtypes; and everything that is refused there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from entrenar.core.errors import InputError
from entrenar.merging.config import read_merge_config
from entrenar.merging.directory import merged_config
from entrenar.merging.plan import MergePlan, make_plan
from tests.support.models_on_disk import tensors, write_config, write_model


def plan_of(**config: Any) -> MergePlan:
    return make_plan(read_merge_config(config)[0])


def both(trio: dict[str, str], **changes: Any) -> dict[str, Any]:
    models = [{"model": trio[name], "parameters": {"weight": 0.5}} for name in "ab"]
    return {"merge_method": "ties", "base_model": trio["base"], "models": models, **changes}


def test_every_tensor_comes_once_with_its_inputs(trio: dict[str, str]) -> None:
    plan = plan_of(**both(trio))
    assert {tensor.name for tensor in plan.tensors} == set(tensors(0))
    assert len(plan.tensors) == len(tensors(0))
    assert all(tensor.labels == [trio["a"], trio["b"]] and tensor.base is not None for tensor in plan.tensors)
    assert {tensor.dtype for tensor in plan.tensors} == {torch.float32}


def test_the_base_may_be_listed_among_the_models(trio: dict[str, str]) -> None:
    config = both(trio)
    config["models"].insert(0, {"model": trio["base"]})
    assert plan_of(**config).tensors[0].labels == [trio["a"], trio["b"]]


def test_slices_are_numbered_anew_and_gradients_run_through_each(trio: dict[str, str]) -> None:
    slices = [
        {"sources": [{"model": trio["a"], "layer_range": [0, 2]}, {"model": trio["b"], "layer_range": [1, 3]}]},
        {"sources": [{"model": trio["a"], "layer_range": [0, 3]}, {"model": trio["b"], "layer_range": [0, 3]}]},
    ]
    plan = plan_of(merge_method="slerp", base_model=trio["a"], slices=slices, parameters={"t": [0, 1]})
    found = {tensor.name: tensor for tensor in plan.tensors}
    assert len(found) == 3 + 5 * 3
    ts = [found[f"model.layers.{layer}.mlp.down_proj.weight"].options["t"] for layer in range(5)]
    assert ts == [0, 1, 0, 0.5, 1]
    first = found["model.layers.0.mlp.down_proj.weight"]
    assert first.models[0] == plan.models[trio["b"]].tensors["model.layers.1.mlp.down_proj.weight"]
    config = merged_config(plan)
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == ["type-0", "type-1", "type-0", "type-1", "type-2"]


def test_a_head_that_all_models_tie_stays_tied(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / str(i), tensors(i, tied=True), tied=True) for i in range(2)]
    models = [{"model": path, "parameters": {"weight": 1}} for path in paths]
    plan = plan_of(merge_method="linear", models=models)
    assert "lm_head.weight" not in {tensor.name for tensor in plan.tensors}
    assert merged_config(plan)["tie_word_embeddings"] is True


def test_where_one_model_has_a_head_of_its_own_the_others_lend_their_embedding(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", tensors(0, tied=True), tied=True)
    own = write_model(tmp_path / "own", tensors(1))
    plan = plan_of(merge_method="linear", models=[{"model": p, "parameters": {"weight": 1}} for p in (tied, own)])
    head = next(tensor for tensor in plan.tensors if tensor.name == "lm_head.weight")
    assert head.models[0] == plan.models[tied].tensors["model.embed_tokens.weight"]
    assert merged_config(plan)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32", "out_dtype": "float16"}, torch.float16),
    ],
)
def test_the_results_dtype(tmp_path: Path, trio: dict[str, str], changes: dict[str, str], dtype: torch.dtype) -> None:
    half = write_model(tmp_path / "half", tensors(4, dtype=torch.bfloat16))
    models = [{"model": path, "parameters": {"weight": 1}} for path in (half, trio["a"])]
    plan = plan_of(merge_method="linear", models=models, **changes)
    assert {tensor.dtype for tensor in plan.tensors} == {dtype}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"merge_method": "tie"}, r"unknown merge_method 'tie' \(did you mean 'ties'\?\)"),
        ({"base_model": None}, "ties needs a base_model"),
        ({"parameters": {"densty": 1}}, "does not read the parameter 'densty'"),
        (
            {"parameters": {"density": [{"filter": "mpl", "value": 1}]}},
            "the filter 'mpl' of 'density' decides for no tensor",
        ),
        ({"models": []}, "the list is empty"),
        ({"tokenizer_source": "bse"}, "tokenizer_source needs|tokenizer_source is 'bse'"),
    ],
)
def test_what_is_refused(trio: dict[str, str], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        plan_of(**both(trio, **changes))


def test_a_weight_that_nobody_gives_is_an_error(trio: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"ties needs the parameter 'weight' for model 1 \(models\.0\.parameters\)"):
        plan_of(merge_method="ties", base_model=trio["base"], models=[{"model": trio["a"]}])


def test_parameters_of_the_base_are_read_by_nobody_and_that_is_told(trio: dict[str, str]) -> None:
    config = both(trio)
    config["models"].append({"model": trio["base"], "parameters": {"weight": 1}})
    plan = plan_of(**config)
    assert plan.tensors[0].options == plan_of(**both(trio)).tensors[0].options
    (remark,) = plan.remarks
    assert remark.startswith("models.2.parameters: the base model's parameters (weight) count for nothing")


def test_models_that_do_not_fit_are_told(tmp_path: Path, trio: dict[str, str]) -> None:
    def against(path: str, **changes: Any) -> MergePlan:
        return plan_of(**both(trio, models=[{"model": path, "parameters": {"weight": 1}}], **changes))

    deeper = write_model(tmp_path / "deeper", tensors(1, layers=4))
    with pytest.raises(InputError, match=r"different numbers of layers .*use slices"):
        against(deeper)
    wider = write_model(tmp_path / "wider", tensors(1, vocabulary=22))
    with pytest.raises(InputError, match=r"embed_tokens.weight has different shapes .*set tokenizer_source"):
        against(wider)
    values = tensors(1)
    del values["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(InputError, match=r"lacks|has no tensor model\.layers\.1\.mlp\.down_proj\.weight"):
        against(write_model(tmp_path / "lacking", values))


def test_pickles_are_refused_with_the_way_out(tmp_path: Path, trio: dict[str, str]) -> None:
    directory = tmp_path / "pickled"
    directory.mkdir()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (directory / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"weights in pickles .*save the model as safetensors first"):
        plan_of(**both(trio, base_model=str(directory)))


def test_a_truncated_shard_is_an_error(tmp_path: Path, trio: dict[str, str]) -> None:
    path = write_model(tmp_path / "cut", tensors(1))
    file = Path(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        plan_of(**both(trio, base_model=path))


def test_mistakes_in_the_yaml_come_with_their_lines(tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "m.yaml",
        merge_method="linear",
        models=[{"model": "a", "paramters": {}}, {"modl": "b"}],
        dtpe="float32",
    )
    with pytest.raises(InputError) as caught:
        read_merge_config(path)
    told = str(caught.value).splitlines()
    assert any("m.yaml:4: unknown key 'models.0.paramters': did you mean 'parameters'?" in line for line in told), told
    assert any("'models.1.model' is missing" in line for line in told), told
    assert any("unknown key 'dtpe': did you mean 'dtype'?" in line for line in told), told


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"models": [], "slices": []}, "give one of models, slices and modules"),
        ({}, "give one of models, slices and modules, not none"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [2, 1]}]}]}, "0 <= first < end"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}, {"model": "b", "layer_range": [0, 2]}]}]},
         "layer ranges of one length"),
    ],
)  # fmt: skip
def test_configs_that_say_too_much_or_too_little(tmp_path: Path, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_merge_config(write_config(tmp_path / "m.yaml", merge_method="linear", **values))
