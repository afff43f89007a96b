"""What the inputs have comes into the result, is refused, or is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.merging.layer_config import follow_layers
from entrenar.merging.names import shown_names, without_paths
from entrenar.recipes.merge import merge
from tests.support.models_on_disk import HIDDEN, tensors, write_model, write_tokenizer

BIAS = "model.layers.1.self_attn.q_proj.bias"


def linear(*paths: str, **changes: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": p, "parameters": {"weight": 1}} for p in paths], **changes}


def stack(*parts: tuple[str, int, int]) -> dict[str, Any]:
    slices = [{"sources": [{"model": path, "layer_range": [first, end]}]} for path, first, end in parts]
    return {"merge_method": "passthrough", "slices": slices}


@pytest.mark.parametrize("name", [BIAS, "score.weight", "model.embed_positions.weight"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_tensor_that_one_model_alone_has_is_refused_by_name(tmp_path: Path, name: str, order: int) -> None:
    paths = [write_model(tmp_path / "a", tensors(0)), write_model(tmp_path / "b", tensors(1) | {name: torch.ones(8)})]
    with pytest.raises(InputError, match=rf"tensors? (that .* has not \()?.*{name.split('.')[-2]}"):
        merge(linear(*paths[::order]), tmp_path / "out")


def test_what_slices_leave_behind_is_told(tmp_path: Path) -> None:
    extra = {"score.weight": torch.ones(8), "model.rotary_emb.inv_freq": torch.ones(4)}
    first = write_model(tmp_path / "first", tensors(0) | extra)
    other = write_model(tmp_path / "other", tensors(1))
    (remark,) = merge(stack((first, 0, 2), (other, 1, 3)), tmp_path / "out").remarks
    assert "of first, outside of the layers that were chosen, 2 tensors are not in the result: score.weight" in remark


def buffers(last: int = 3) -> dict[str, Tensor]:
    return {
        "model.position_ids": torch.arange(600), "model.layers.0.attn.bias": torch.ones(2, 2, dtype=torch.uint8),
        "model.flags": torch.tensor([True, False]), "model.layers.1.attn.ids": torch.tensor([1, last]),
    }  # fmt: skip


def test_integers_and_truth_values_are_copied_as_they_are(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / name, tensors(seed) | buffers()) for seed, name in enumerate("ab")]
    merge(linear(*paths, out_dtype="bfloat16"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in buffers().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    other = write_model(tmp_path / "c", tensors(2) | buffers(last=4))
    with pytest.raises(InputError, match=r"layers\.1\.attn\.ids holds int64 values that differ between"):
        merge(linear(paths[0], other), tmp_path / "no")


def vision(layers: int = 5) -> dict[str, Tensor]:
    return {f"vision_tower.encoder.layers.{i}.fc.weight": torch.full((2, 2), float(i)) for i in range(layers)}


def test_slices_of_a_vision_language_model_leave_its_tower_alone(tmp_path: Path) -> None:
    path = Path(write_model(tmp_path / "vlm", tensors(0) | vision()))
    config = {"text_config": {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]},
              "vision_config": {"num_hidden_layers": 5, "marks": [0, 1, 2]}}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    merge(stack((str(path), 0, 2), (str(path), 1, 3)), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], x) for name, x in vision().items())
    assert sum(name.endswith("q_proj.weight") for name in found) == 4
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "c"]}
    assert written["vision_config"] == config["vision_config"]


def test_what_a_config_says_layer_by_layer_follows_the_layers() -> None:
    config = {
        "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "block_configs": [{"n": i} for i in range(4)],
        "intermediate_size": [10, 20, 30, 40], "mlp_only_layers": [0, 3], "architectures": list("abcd"),
        "eos_token_id": [1, 2, 3, 4], "hybrid_override_pattern": "M-M*", "full_attention_idxs": [],
    }  # fmt: skip
    follow_layers(config, [0, 1, 1, 3, 2])
    assert config == {
        "num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "block_configs": [{"n": i} for i in (0, 1, 1, 3, 2)],
        "intermediate_size": [10, 20, 20, 40, 30], "mlp_only_layers": [0, 3], "architectures": list("abcd"),
        "eos_token_id": [1, 2, 3, 4], "hybrid_override_pattern": "M--*M", "full_attention_idxs": [],
    }  # fmt: skip


def test_a_rule_by_number_that_would_say_something_else_is_refused() -> None:
    follow_layers({"n_layer": 4, "attn_layer_period": 2}, [0, 1, 2, 3, 2, 3])
    follow_layers({"n_layer": 4, "max_window_layers": 3, "use_sliding_window": False}, [0, 1, 1])
    with pytest.raises(InputError, match=r"'attn_layer_period' \(2\) .* layer 2 of the result was layer 1"):
        follow_layers({"n_layer": 4, "attn_layer_period": 2}, [0, 1, 1, 2])
    with pytest.raises(InputError, match="first_k_dense_replace"):
        follow_layers({"n_layer": 4, "first_k_dense_replace": 1}, [1, 2, 3])


def test_layers_that_are_missing_are_told_without_counting_to_them(tmp_path: Path) -> None:
    odd = write_model(tmp_path / "odd", tensors(0) | {"model.layers.999999999.x": torch.ones(2)})
    with pytest.raises(InputError, match="has tensors of 4 layers, none of layer 3"):
        merge(linear(odd), tmp_path / "out")
    short = Path(write_model(tmp_path / "short", tensors(0)))
    (short / "config.json").write_text('{"num_hidden_layers": 1000000000000}')
    with pytest.raises(InputError, match=r"none of layer 3, and its config\.json says 1000000000000"):
        merge(linear(str(short)), tmp_path / "out")


def test_a_token_without_a_row_anywhere_is_refused_and_special_ones_stay_special(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / name, tensors(seed, vocabulary=3)) for seed, name in enumerate("ab")]
    write_tokenizer(paths[0], ["a", "b", "c", "lost"])
    write_tokenizer(paths[1], ["a", "b"])
    with pytest.raises(InputError, match="no model has a row in its embedding for 'lost'"):
        merge(linear(*paths, base_model=paths[0], tokenizer_source="base"), tmp_path / "out")
    write_tokenizer(paths[0], ["a", "b", "c"])
    file = Path(paths[1]) / "tokenizer.json"
    added = {"id": 2, "content": "<end>", "single_word": False, "lstrip": False, "rstrip": True, "normalized": False,
             "special": True}  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens": [added]}))
    merge(linear(*paths, base_model=paths[0], tokenizer={"source": "union"}), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert written == [added | {"id": 3}]
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[3], tensors(1, vocabulary=3)["model.embed_tokens.weight"][2])
    assert rows.shape == (4, HIDDEN)


def test_what_is_written_names_no_place_of_this_machine(tmp_path: Path) -> None:
    paths = [write_model(tmp_path / name / "model", tensors(seed)) for seed, name in enumerate("ab")]
    text = "\n".join([
        f"# from {tmp_path}/notes", "merge_method: linear", "models:",
        *(f"- {{model: {path}, parameters: {{weight: 1}}}}" for path in paths),
    ])  # fmt: skip
    (tmp_path / "m.yaml").write_text(text)
    merge(tmp_path / "m.yaml", tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert "model (1)" in (tmp_path / "out" / "README.md").read_text()
    assert shown_names(["hub/id", str(tmp_path)]) == {"hub/id": "hub/id", str(tmp_path): tmp_path.name}
    kept = "chat: '</think>' a/b https://x.org/tmp/y 1/2"
    assert without_paths(kept, {}) == kept


def test_a_stack_of_one_models_layers_is_not_called_equal_to_it(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a", tensors(0))
    assert merge(stack((path, 0, 2), (path, 1, 3)), tmp_path / "out").remarks == []
    assert merge(stack((path, 0, 3)), tmp_path / "same").remarks == ["the result is equal to a: nothing was merged"]


@pytest.mark.parametrize("weights", [(1.0, -1.0), (1.0, -1.0 + 1e-9)])
def test_weights_that_cancel_are_refused(tmp_path: Path, weights: tuple[float, float]) -> None:
    asked = linear(*(write_model(tmp_path / name, tensors(seed)) for seed, name in enumerate("ab")))
    for model, weight in zip(asked["models"], weights, strict=True):
        model["parameters"] = {"weight": weight}
    with pytest.raises(InputError, match="add up to 0"):
        merge(asked, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("merge_method: linear\n---\nmerge_method: slerp\n", "several YAML documents"),
        ("experts: []\ngate_mode: hidden\n", "mergekit-moe"),
        ("merge_method: linear\nmodels: []\ntokenizer: {pad_to_multiple_of: 64}\n", "pad_to_multiple_of is not read"),
        (None, "does not exist: check the path; the least that it holds is\n  merge_method"),
    ],
)
def test_configs_that_are_none_of_a_merge_are_named(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(InputError, match=sentence):
        merge(tmp_path / "m.yaml", tmp_path / "out")
