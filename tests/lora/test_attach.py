"""attach_lora: the chosen linear layers are adapted, all else is frozen; a mistake changes nothing."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from entrenar.core.errors import InputError
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.attach import adapted_layers, attach_lora, match_targets
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.qlora_layer import QLoRALayer
from entrenar.quant.tensor import quantize

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(10).view(2, 5)


def tiny_llama(*, tied: bool = False) -> LlamaForCausalLM:
    """Hidden 32, 2 layers, vocabulary 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def expected_names(attention: list[str], mlp: list[str]) -> list[str]:
    """Full names of these layers of `tiny_llama`."""
    blocks = [f"model.layers.{number}" for number in range(2)]
    return [f"{b}.{part}" for b in blocks for part in [f"self_attn.{a}" for a in attention] + [f"mlp.{m}" for m in mlp]]


def stack() -> nn.Sequential:
    """A wide layer, then a narrow one."""
    return nn.Sequential(OrderedDict(wide=nn.Linear(32, 32), narrow=nn.Linear(32, 4, bias=False)))


def quantized_stack() -> nn.Sequential:
    model = stack()
    for name, layer in list(model.named_children()):
        assert isinstance(layer, nn.Linear)
        setattr(model, name, QuantizedLinear(quantize(layer.weight, format="nf4", double_quant=True), layer.bias))
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_is_every_linear_layer_but_the_head(tied: bool) -> None:
    model = tiny_llama(tied=tied)
    names = attach_lora(model, rank=4)
    assert sorted(names) == sorted(expected_names(ATTENTION, MLP))
    assert [name for name, _ in adapted_layers(model)] == names
    assert isinstance(model.lm_head, nn.Linear)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied


def test_a_list_of_suffixes_selects_layers_by_the_end_of_their_name() -> None:
    assert match_targets(tiny_llama(), ["q_proj", "v_proj"]) == expected_names(["q_proj", "v_proj"], [])
    assert match_targets(tiny_llama(), ["mlp.down_proj"]) == expected_names([], ["down_proj"])
    assert match_targets(tiny_llama(), ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert match_targets(tiny_llama(), ["lm_head"]) == ["lm_head"]


def test_another_string_is_a_regular_expression_for_the_whole_name() -> None:
    found = match_targets(tiny_llama(), r".*layers\.1\.self_attn\.[qk]_proj")
    assert found == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]


@pytest.mark.parametrize("targets", [["proj"], ["_proj"], ["elf_attn.q_proj"], ["q_proj."], "q_proj", r"layers\.1", ""])
def test_a_target_that_matches_nothing_lists_what_exists(targets: str | list[str]) -> None:
    with pytest.raises(InputError) as caught:
        attach_lora(tiny_llama(), rank=4, targets=targets)
    assert repr(targets if isinstance(targets, str) else targets[0]) in str(caught.value)
    assert all(name in str(caught.value) for name in [*ATTENTION, *MLP, "lm_head"])


def test_one_target_of_a_list_that_matches_nothing_is_an_error_too() -> None:
    model = tiny_llama()
    with pytest.raises(InputError, match="w_proj"):
        attach_lora(model, rank=4, targets=["q_proj", "w_proj"])
    assert list(adapted_layers(model)) == []


def test_an_empty_list_of_targets_is_an_error() -> None:
    with pytest.raises(InputError, match="matches no linear layer"):
        attach_lora(tiny_llama(), rank=4, targets=[])


def test_a_broken_regular_expression_is_an_input_error() -> None:
    with pytest.raises(InputError, match="not a regular expression"):
        attach_lora(tiny_llama(), rank=4, targets="([")


def test_a_rank_below_one_names_the_layer_and_changes_nothing() -> None:
    model = stack()
    before = list(model.children())
    with pytest.raises(InputError, match=r"cannot adapt .*: rank 0 .*1 or more"):
        attach_lora(model, rank=0)
    assert list(model.children()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_attaching_twice_is_an_error() -> None:
    model = tiny_llama()
    attach_lora(model, rank=4, targets=["q_proj"])
    with pytest.raises(InputError, match="adapters attached already"):
        attach_lora(model, rank=4, targets=["v_proj"])
    assert {name.rpartition(".")[2] for name, _ in adapted_layers(model)} == {"q_proj"}


def test_only_the_factors_are_trained() -> None:
    model = tiny_llama()
    names = attach_lora(model, rank=4, targets=["q_proj", "up_proj"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{factor}" for name in names for factor in ("lora_a", "lora_b")}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], "lm_head"])
def test_a_fresh_adapter_does_not_change_the_models_output(targets: str | list[str]) -> None:
    model = tiny_llama()
    before = model(IDS).logits
    attach_lora(model, rank=4, targets=targets)
    assert torch.equal(model(IDS).logits, before)


def test_rank_alpha_dropout_bias_and_weight_reach_the_layers() -> None:
    model = stack()
    wide = model.get_submodule("wide")
    attach_lora(model, rank=3, alpha=6, dropout=0.25)
    layer = model.get_submodule("wide")
    assert isinstance(wide, nn.Linear)
    assert isinstance(layer, LoRALayer)
    assert (layer.rank, layer.scale, layer.dropout) == (3, 2.0, 0.25)
    assert layer.base_weight.data_ptr() == wide.weight.data_ptr()
    assert layer.bias is not None
    assert layer.bias.data_ptr() == wide.bias.data_ptr()


def test_a_quantized_layer_becomes_a_qlora_layer_over_the_same_bytes() -> None:
    model = quantized_stack()
    x = torch.randn(3, 32)
    before = model(x)
    held = {p.data_ptr() for p in model.parameters()}
    assert attach_lora(model, rank=2) == ["wide", "narrow"]
    assert all(isinstance(layer, QLoRALayer) for _, layer in adapted_layers(model))
    assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} == held
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("training", [False, True])
def test_the_training_mode_is_kept(training: bool) -> None:
    model = stack().train(training)
    attach_lora(model, rank=2, dropout=0.5)
    assert [layer.training for _, layer in adapted_layers(model)] == [training] * 2


def test_the_parts_inside_an_adapted_layer_are_no_targets() -> None:
    model = quantized_stack()
    attach_lora(model, rank=2)
    assert match_targets(model, r".*") == ["wide", "narrow"]


@pytest.mark.parametrize("exclude", [["nothing"], ["q_proj", "v_porj"], r".*nothing"])
def test_a_word_that_excludes_nothing_is_refused(exclude: str | list[str]) -> None:
    with pytest.raises(InputError, match=r"lora\.exclude: .* matches no layer"):
        attach_lora(tiny_llama(), rank=2, exclude=exclude)
