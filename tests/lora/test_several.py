"""Several adapters: switching is exact, off is the base, combinations are the weighted sum of the changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora, trained_parameters
from entrenar.lora.several import Adapters

IDS = torch.arange(14).view(2, 7)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"targets": ["q_proj", "up_proj"]},
    "other rank": {"targets": ["up_proj", "down_proj"], "rank_pattern": {"down_proj": 6}},
    "dora": {"targets": ["v_proj"], "dora": True},
    "saved": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
    "pissa": {"targets": ["o_proj"], "init": "pissa"},
}


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    for seed, (name, changes) in enumerate(KINDS.items()):
        model = llama()
        torch.manual_seed(seed)
        attach_lora(model, rank=3, alpha=6, **changes)
        for _, parameter in trained_parameters(model):
            parameter.data += torch.randn_like(parameter) * 0.1
        save_adapter(model, tmp_path / name)
    return {name: tmp_path / name for name in KINDS}


def test_switching_gives_what_each_gives_alone_and_off_the_base(directories: dict[str, Path]) -> None:
    model = llama()
    adapters, base = Adapters(model), logits(model)
    for name, directory in directories.items():
        adapters.load(directory, name)
    for name in (*KINDS, *reversed(KINDS)):
        alone = llama()
        load_adapter(alone, directories[name])
        adapters.use(name)
        assert torch.equal(logits(model), logits(alone))
        assert [n for n, _ in trained_parameters(model)] == [n for n, _ in trained_parameters(alone)]
    adapters.off()
    assert torch.equal(logits(model), base)
    assert not trained_parameters(model)
    assert (adapters.names, adapters.active) == (list(KINDS), None)


def deltas(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.merge_to_f32() - layer.base_to_f32() for name, layer in adapted_layers(model)}


@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", 9)])
def test_an_exact_combination_is_the_weighted_sum(directories: dict[str, Path], method: str, rank: int | None) -> None:
    model = llama()
    adapters = Adapters(model)
    expected: dict[str, Tensor] = {}
    for name, weight in (("plain", 0.5), ("other rank", -2.0)):
        adapters.load(directories[name], name)
        adapters.use(name)
        for layer, delta in deltas(model).items():
            expected[layer] = expected.get(layer, torch.zeros(())) + weight * delta
    error = adapters.combine({"plain": 0.5, "other rank": -2.0}, "both", method, rank=rank)
    adapters.use("both")
    found = deltas(model)
    assert error < 1e-4
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[layer], expected[layer], atol=1e-5) for layer in expected)


@pytest.mark.parametrize("method", ["svd", "ties", "dare", "dare_ties"])
def test_a_rank_that_is_too_small_says_how_much_is_lost(directories: dict[str, Path], method: str) -> None:
    adapters = Adapters(llama())
    for name in ("plain", "other rank"):
        adapters.load(directories[name], name)
    errors = [adapters.combine({"plain": 1, "other rank": 1}, f"{r}", method, rank=r) for r in (1, 2, 32)]
    assert 1 > errors[0] > errors[1] > errors[2] < 1e-4


def test_a_combined_adapter_is_saved_as_any_other(directories: dict[str, Path], tmp_path: Path) -> None:
    model = llama()
    adapters = Adapters(model)
    for name in ("plain", "other rank"):
        adapters.load(directories[name], name)
    adapters.combine({"plain": 1, "other rank": 1}, "both", "cat")
    adapters.save("both", tmp_path / "both")
    adapters.use("both")
    again = llama()
    load_adapter(again, tmp_path / "both")
    assert torch.equal(logits(again), logits(model))


def test_mistakes_name_what_there_is(directories: dict[str, Path]) -> None:
    adapters = Adapters(llama())
    adapters.load(directories["plain"], "a")
    adapters.load(directories["dora"], "b")
    adapters.use("a")
    with pytest.raises(InputError, match="no adapter 'c': there are a, b"):
        adapters.use("c")
    with pytest.raises(InputError, match="already"):
        adapters.load(directories["dora"], "a")
    with pytest.raises(InputError, match="b is more than plain LoRA"):
        adapters.combine({"a": 1, "b": 1}, "c")
    with pytest.raises(InputError, match="choose linear, cat, svd"):
        adapters.combine({"a": 1}, "c", "mean")
    assert adapters.active == "a"


def test_a_model_with_an_adapter_attached_is_refused() -> None:
    model = llama()
    attach_lora(model, rank=2)
    with pytest.raises(InputError, match="adapters attached already"):
        Adapters(model)
