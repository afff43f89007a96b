"""Adapters as peft makes and saves them: live logits of each kind to 3e-6, and back again in peft.

Those over experts are in test_peft_experts.py.
"""

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.lora.adapter_io import load_adapter, save_adapter

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::FutureWarning", "ignore::RuntimeWarning:peft.*"),
]

IDS = torch.randint(5, 64, (2, 9), generator=torch.Generator().manual_seed(1))
Q = ["q_proj"]
BASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "tied": {"model": "llama", "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gemma3_text": {"head_dim": 16, "tie_word_embeddings": True},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    },
    "gpt_neox": {}, "phi3": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "falcon": {},
}  # fmt: skip
# Base, and what peft is asked for.
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    *[("llama", {"target_modules": targets}) for targets in (
        Q, ["q_proj", "mlp.down_proj"], "all-linear", r".*layers\.1\.mlp\.(up|down)_proj",
        ["model.layers.0.self_attn.o_proj"],
        ["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "v_proj"], [r"gate_proj", "up_proj"],
    )],
    *[("llama", {"target_modules": ["q_proj", "down_proj"], **more}) for more in (
        {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}, {"r": 1}, {"r": 40},
        {"lora_alpha": 0.5}, {"rank_pattern": {"down_proj": 7}}, {"rank_pattern": {r"layers\.1\..*": 2}},
        {"alpha_pattern": {"q_proj": 32}}, {"alpha_pattern": {r"model\.layers\.0\.self_attn\.q_proj": 1.5}},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
        {"layers_to_transform": 1}, {"layers_to_transform": [0]}, {"layers_to_transform": [0, 1]},
        {"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": ["layers.0.mlp.down_proj"]},
        {"exclude_modules": r".*\.1\..*"}, {"bias": "all"}, {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["input_layernorm"]}, {"modules_to_save": ["o_proj"]}, {"modules_to_save": ["down_proj"]},
        {"trainable_token_indices": [3, 7]}, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4, 5]}},
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "pissa"}, {"lora_dropout": 0.3},
    )],
    *[("tied", {"target_modules": targets}) for targets in (
        ["embed_tokens", "q_proj"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"])],
    *[("tied", {"target_modules": targets, "ensure_weight_tying": True}) for targets in (
        ["embed_tokens", "q_proj"], ["lm_head", "q_proj"])],
    *[("tied", {"target_modules": Q, **more}) for more in (
        {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 7]}, {"trainable_token_indices": {"lm_head": [3, 7]}},
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}},
        {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
    )],
    *[("gpt2", {"target_modules": targets, "fan_in_fan_out": True, **more}) for targets, more in (
        (["c_attn"], {}), ("all-linear", {}), (["c_attn", "mlp.c_proj"], {"use_dora": True}), (["wte", "c_fc"], {}),
        (["c_attn"], {"bias": "all"}), (["c_attn"], {"modules_to_save": ["ln_f"]}),
        (["c_attn"], {"trainable_token_indices": [3, 7]}), (["c_attn"], {"modules_to_save": ["wte"]}),
    )],
    *[("gemma3_text", {"target_modules": targets, **more}) for targets, more in (
        ("all-linear", {}), (["embed_tokens", "q_proj"], {}), (Q, {"modules_to_save": ["norm"]}),
        (Q, {"trainable_token_indices": [3, 7]}))],
    *[("qwen2_moe", {"target_modules": targets, **more}) for targets, more in (
        ("all-linear", {}), (["shared_expert_gate"], {}), (Q, {"exclude_modules": ["layers.0.self_attn.q_proj"]}))],
    *[(name, {"target_modules": "all-linear"}) for name in ("gpt_neox", "phi3", "opt", "falcon")],
]  # fmt: skip


@cache
def _made(name: str) -> PreTrainedModel:
    changes = dict(BASES[name])
    shape: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    config = AutoConfig.for_model(changes.pop("model", name), **{**shape, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms and biases count as well
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model


def base(name: str) -> PreTrainedModel:
    """The same weights at every call."""
    return copy.deepcopy(_made(name))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def theirs(name: str, path: Path, options: dict[str, Any]) -> Tensor:
    """Live logits of peft's model, whose adapter is saved at `path`."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(name), LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(str(path))
    return logits(model)


@pytest.mark.parametrize(("name", "options"), ADAPTERS, ids=lambda value: str(value).replace("target_modules", "t"))
def test_a_peft_adapter_gives_its_live_logits_and_goes_back(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    expected = theirs(name, tmp_path / "theirs", options)
    ours = base(name)
    load_adapter(ours, tmp_path / "theirs")
    scale = expected.abs().max()
    assert (logits(ours) - expected).abs().max() <= 3e-6 * scale
    assert (expected - logits(base(name))).abs().max() > 1e-3 * scale  # the adapter does something
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(base(name), tmp_path / "ours")
    assert (logits(again) - expected).abs().max() <= 3e-6 * scale


def test_there_are_as_many_as_were_tried() -> None:
    assert len(ADAPTERS) >= 54


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"target_modules": Q, "lora_bias": True}, "lora_bias"),
    ("llama", {"target_modules": Q, "init_lora_weights": "olora"}, "changed the base as well"),
    ("llama", {"target_modules": Q, "layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ("tied", {"target_modules": ["lm_head"], "trainable_token_indices": [3]}, "its rows are not trained apart"),
    (
        "gpt2",
        {"target_modules": ["wpe", "c_attn"], "use_dora": True, "fan_in_fan_out": True},
        "DoRA over an embedding",
    ),
]


@pytest.mark.parametrize(("name", "options", "named"), REFUSED, ids=str)
def test_what_is_not_read_is_refused_in_a_true_sentence(
    name: str, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    theirs(name, tmp_path / "adapter", options)
    ours = base(name)
    with pytest.raises(InputError, match=named):
        load_adapter(ours, tmp_path / "adapter")
