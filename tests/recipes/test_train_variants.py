"""Whole runs with the variants: they learn, stop and go on to the same bits, and their adapter is the model's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from entrenar.core.config import load_config
from entrenar.core.errors import InputError
from entrenar.files.peft import read_adapter
from entrenar.opening.adapted import open_model
from entrenar.recipes.check import check
from entrenar.recipes.config import RunConfig
from entrenar.recipes.train import train

MakeConfig = Callable[..., Path]
RUNS: dict[str, dict[str, Any]] = {
    "dora+": {"lora.dora": True, "lora.rslora": True, "optimizer.lora_plus_ratio": 4.0},
    "pissa": {"lora.init": "pissa", "lora.dropout": 0.0, "model.quantize": {"format": "nf4", "search": True}},
    "loftq": {"lora.init": "loftq_2", "lora.rank_pattern": {"down_proj": 2}},
    "saved": {"lora.modules_to_save": ["embed_tokens"], "lora.bias": "all", "lora.targets": ["q_proj"]},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_its_adapter_is_opened_again(make_config: MakeConfig, tiny_model_dir: Path, name: str) -> None:
    config = make_config(**RUNS[name])
    counted = check(config)
    losses: list[float] = []
    result = train(config, on_step=lambda report: losses.append(report.loss))
    assert losses[-1] < losses[0]
    stored = load_file(Path(result.adapter) / "adapter_model.safetensors")
    tied = 1 if name == "saved" else 0  # the head is written too
    written = sum(t.numel() for key, t in stored.items() if not (tied and "lm_head" in key))
    assert counted.trainable_parameters == written
    model, _ = open_model(str(tiny_model_dir), result.adapter)
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("name", ["dora+", "pissa", "saved"])
def test_a_resumed_run_is_the_straight_one(make_config: MakeConfig, name: str) -> None:
    straight = train(make_config("straight", **RUNS[name]))
    config = make_config("resumed", **RUNS[name])
    whole = train(config)
    for file in ("result.json",):
        (Path(whole.run_dir) / file).unlink()
    import shutil

    shutil.rmtree(whole.adapter)
    for late in (Path(whole.run_dir) / "checkpoints").glob("step-6"):
        shutil.rmtree(late)
    resumed = train(config)
    assert resumed.resumed_from_step > 0
    first, second = (read_adapter(Path(run.adapter)).tensors for run in (straight, resumed))
    for layer, parts in first.layers.items():
        assert all(torch.equal(parts[end], second.layers[layer][end]) for end in parts)
    assert all(torch.equal(first.saved[key], second.saved[key]) for key in first.saved)


def test_quantize_may_be_a_mapping(make_config: MakeConfig) -> None:
    path = make_config(**{"model.quantize": {"format": "fp4", "search": True, "double_quant": True}})
    model = load_config(RunConfig, path).model
    assert (model.quantize, model.search, model.double_quant, model.block_size) == ("fp4", True, True, 64)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.quantize": {"search": True}}, "quantize takes format"),
        ({"model.quantize": {"format": "nf4", "blocks": 3}}, "quantize takes format"),
        ({"model.quantize": "int4", "model.search": True}, "search is for nf4 and fp4"),
        ({"lora.init": "pisa"}, "unknown initialisation 'pisa'"),
        ({"lora.rank_pattern": {"qq_proj": 4}}, "'qq_proj' matches no adapted layer"),
        ({"lora.modules_to_save": ["q_proj"]}, "is quantized, and quantized weights are not trained"),
        ({"lora.modules_to_save": ["nothing"]}, "has nothing, which this model does not have"),
    ],
)
def test_a_mistake_is_one_sentence(make_config: MakeConfig, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        train(make_config(**changes))
