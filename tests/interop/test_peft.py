"""LoRA against peft: the same numbers from the same weights, and each reads the other's adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from entrenar.core.errors import InputError
from entrenar.data.feed import FEED_NAME
from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.lora.lora_layer import LoRALayer
from entrenar.opening.adapted import open_model
from entrenar.recipes.train import train

pytestmark = pytest.mark.interop

IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))
TARGETS = ["all-linear", ["q_proj", "v_proj"], ["mlp.down_proj"], r".*layers\.1\..*_proj", ["lm_head"]]
every_target = pytest.mark.parametrize("targets", TARGETS, ids=str)
Targets = str | list[str]


def tiny_llama() -> LlamaForCausalLM:
    """The same weights on every call, large enough that logits differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def their_model(targets: Targets, **changes: Any) -> PeftModel:
    """peft's model, with random A and B."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **changes)
    model = get_peft_model(tiny_llama(), config).eval()
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def our_model(targets: Targets) -> LlamaForCausalLM:
    """Ours, with random A and B."""
    model = tiny_llama()
    attach_lora(model, rank=4, alpha=6, targets=targets)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_b, std=0.2)
    return model


def their_factors(model: PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Layer path → (A, B)."""
    modules = dict(model.get_base_model().named_modules())
    adapted: dict[str, Any] = {name: module for name, module in modules.items() if hasattr(module, "lora_A")}
    return {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in adapted.items()}


def copied_from(theirs: PeftModel, targets: Targets) -> LlamaForCausalLM:
    """Our model with peft's factors."""
    model = our_model(targets)
    factors = their_factors(theirs)
    for name, layer in adapted_layers(model):
        layer.lora_a.data.copy_(factors[name][0])
        layer.lora_b.data.copy_(factors[name][1])
    return model


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@every_target
def test_the_same_targets_adapt_the_same_layers(targets: Targets) -> None:
    ours = [name for name, _ in adapted_layers(our_model(targets))]
    assert sorted(ours) == sorted(their_factors(their_model(targets)))


@every_target
def test_the_same_weights_give_the_same_logits_and_gradients(targets: Targets) -> None:
    theirs = their_model(targets)
    ours = copied_from(theirs, targets)
    for model in (theirs, ours):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert torch.allclose(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    assert (logits(ours) - logits(tiny_llama())).abs().max() > 0.01  # the adapter does something
    for name, layer in adapted_layers(ours):
        for factor, their_factor in zip((layer.lora_a, layer.lora_b), their_factors(theirs)[name], strict=True):
            assert factor.grad is not None
            assert their_factor.grad is not None
            assert torch.allclose(factor.grad, their_factor.grad, rtol=0, atol=1e-5)
            assert factor.grad.abs().max() > 1e-4


def test_the_merged_weights_are_the_same() -> None:
    theirs = their_model("all-linear")
    ours = copied_from(theirs, "all-linear")
    merged = theirs.merge_and_unload()
    for name, layer in adapted_layers(ours):
        their_weight = merged.get_submodule(name).weight
        assert isinstance(layer, LoRALayer)
        assert isinstance(their_weight, Tensor)
        assert torch.allclose(layer.merge_to_f32(), their_weight, rtol=0, atol=1e-6)


def test_a_fresh_a_is_drawn_as_pefts() -> None:
    """Both from the same seed, one layer at a time: Kaiming-uniform with a = √5."""
    torch.manual_seed(3)
    ours = LoRALayer(torch.zeros(40, 32), rank=8).lora_a
    model = get_peft_model(nn.Sequential(nn.Linear(32, 40)), LoraConfig(r=8, target_modules=["0"]))
    theirs = dict(model.named_parameters())["base_model.model.0.lora_A.default.weight"]
    assert theirs.abs().max() <= 1 / 32**0.5
    assert ours.abs().max() <= 1 / 32**0.5
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15)


@every_target
def test_peft_loads_our_adapter(tmp_path: Path, targets: Targets) -> None:
    ours = our_model(targets)
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    assert torch.allclose(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    assert sorted(their_factors(theirs)) == sorted(name for name, _ in adapted_layers(ours))


@every_target
def test_we_load_pefts_adapter(tmp_path: Path, targets: Targets) -> None:
    theirs = their_model(targets, lora_dropout=0.25)
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)  # else it adds lm_head's base weight
    ours = tiny_llama()
    load_adapter(ours, tmp_path / "adapter")
    assert torch.allclose(logits(ours.eval()), logits(theirs), rtol=0, atol=1e-5)
    assert {(layer.rank, layer.scale, layer.dropout) for _, layer in adapted_layers(ours)} == {(4, 1.5, 0.25)}


def test_an_adapter_goes_to_peft_and_back_unchanged(tmp_path: Path) -> None:
    save_adapter(our_model("all-linear"), tmp_path / "ours")
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").save_pretrained(str(tmp_path / "theirs"))
    first, second = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def renamed(source: Path, target: Path, old: str, new: str) -> Path:
    """A copy of an adapter directory with a part of every key replaced."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file)
    return target


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", "base_model."),
        ("base_model.model.model.", "base_model.model."),
        (".layers.", ".blocks."),
        ("lora_A.weight", "lora_A.default.weight"),
        (".q_proj.", ".r_proj."),
    ],
)
def test_a_wrong_key_is_an_error(tmp_path: Path, old: str, new: str) -> None:
    their_model(["q_proj", "v_proj"]).save_pretrained(str(tmp_path / "right"))
    wrong = renamed(tmp_path / "right", tmp_path / "wrong", old, new)
    ours = tiny_llama()
    with pytest.raises(InputError) as caught:
        load_adapter(ours, wrong)
    assert str(wrong) in str(caught.value)
    assert list(adapted_layers(ours)) == []


@pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:.*lora_B.bias")  # peft's comments on that choice
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_what_peft_saves_beyond_what_is_read_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    their_model(["q_proj", "v_proj"], **changes).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(InputError, match=named):
        load_adapter(tiny_llama(), tmp_path / "adapter")


def test_our_config_has_only_keys_that_peft_knows(tmp_path: Path) -> None:
    save_adapter(our_model("all-linear"), tmp_path / "adapter")
    ours = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    theirs = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(theirs, LoraConfig)
    assert ours.keys() <= vars(theirs).keys()
    assert (theirs.r, theirs.lora_alpha, theirs.inference_mode) == (4, 6, True)


def test_peft_passes_over_what_a_run_remembers_of_its_rows(make_config: Callable[..., Path]) -> None:
    config = make_config(**{"model.quantize": "none", "training.epochs": 1})
    adapter = Path(train(config).adapter)
    assert (adapter / FEED_NAME).is_file()
    base = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["path"]
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    ours, _ = open_model(base, str(adapter), dtype="float32")
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-4, atol=1e-4)
