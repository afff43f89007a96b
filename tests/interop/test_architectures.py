"""Tiny models of many architectures: loaded and made fast, loss and gradients are transformers' own, in float32.

Adapters' gradients are peft's over transformers' own model.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.models.forward import target_loss
from entrenar.opening.load import load

pytestmark = pytest.mark.interop

_SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 5},
    "phi": {},
    "phi3": {},
    "gpt2": _GPT2,
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": {"sliding_window": 5},
    "starcoder2": {"sliding_window": 5},
    "stablelm": {"qk_layernorm": True},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"sliding_window": 5},
    "mixtral": {"num_local_experts": 4},
    "granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.1, "logits_scaling": 8.0},
    "granitemoe": {"num_local_experts": 4},
    "qwen3_moe": _EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 96,
    },
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 16, "num_heads": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 8},
    "jamba": {"use_mamba_kernels": False, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "deepseek_v3": _LATENT,
    "exaone4": {"sliding_window": 5},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "nemotron": {},
    "helium": {},
    "persimmon": {},
    "biogpt": {},
    "codegen": {**_GPT2, "rotary_dim": 8},
    "gpt_bigcode": _GPT2,
    "apertus": {},
    "arcee": {},
    "seed_oss": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {**_HYBRID, "attn_layer_indices": [1]},
    "falcon_h1": {**_HYBRID, "mamba_d_ssm": 128},
    "recurrent_gemma": {"lru_width": 64},
    "diffllama": {},
    "minicpm3": {
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 5},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
    "vaultgemma": {"sliding_window": 5},
    "dots1": {**_LATENT, "num_key_value_heads": 2, "n_shared_experts": 1},
    "olmoe": _EXPERTS,
    "qwen3_next": {
        **_EXPERTS,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
}


def made(name: str, directory: Path, tokenizer: PreTrainedTokenizerFast, *, harsh: bool) -> PreTrainedModel:
    """A random model, saved; `harsh`: its norms' weights each different, and some near 0 and -1."""
    shape = {key: value for key, value in _SHAPE.items() if (name, key) != ("falcon", "head_dim")}
    config = AutoConfig.for_model(name, **(shape | ARCHITECTURES[name]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if harsh and isinstance(weight, nn.Parameter) and weight.dim() == 1 and "norm" in path.lower():
            weight.data += torch.randn_like(weight) * 0.3
            weight.data[:3] = torch.tensor([1e-3, -0.999, 3.0])
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    targets = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.6
    targets[:, 0] = False
    return ids, torch.arange(20).repeat(2, 1), targets


# What is not loaded yet: then the true reason is said.
REFUSED = {
    "falcon_h1": "has buffers that cannot be computed here: mup_vector",
    "gpt_neox": r"names its tensors otherwise .*embed_out\.weight is lm_head\.weight there",
    "granitemoe": r"names its tensors otherwise .*router\.layer\.weight is .*router\.weight there",
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def opened(name: str, directory: Path) -> PreTrainedModel | None:
    """Ours; None where it is refused for the reason that is listed, which none may be listed for that loads."""
    try:
        model, _ = load(str(directory), "none", dtype="float32")
    except InputError as error:
        assert re.search(REFUSED[name], str(error))
        return None
    assert name not in REFUSED
    return model


@every_architecture
def test_loss_and_gradients(name: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    theirs = made(name, tmp_path, tiny_tokenizer, harsh=True)
    ours = opened(name, tmp_path)
    if ours is None:
        return
    ids, positions, targets = inputs()
    found = target_loss(trained(ours), ids, positions, targets)
    labels = ids.masked_fill(~targets, -100)
    expected = trained(theirs)(input_ids=ids, labels=labels, use_cache=False).loss * targets.sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    expected.backward()
    one, other = (embedding_of(model).grad for model in (ours, theirs))
    assert one is not None and other is not None
    worst = ((one - other).abs().max() / other.abs().max()).item()
    assert worst <= 1e-5  # a norm's weight of 3 beside 1e-3 makes float32's own roundings larger than 5e-6


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a gradient that comes through all of it: its embedding's."""
    model.requires_grad_(False).eval()
    embedding_of(model).requires_grad_()
    return model


def embedding_of(model: PreTrainedModel) -> nn.Parameter:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    return embedding.get_parameter("weight")


# In these peft makes experts of every layer that is named like one of theirs, a dense or shared one too.
_LIKE_EXPERTS = ["gate_proj", "up_proj", "down_proj"]
LEFT_OUT: dict[str, list[str]] = dict.fromkeys(("deepseek_v3", "dots1", "qwen3_next"), _LIKE_EXPERTS)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@every_architecture
def test_adapters_gradients_are_those_of_peft(
    name: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of every layer that all-linear adapts, A's and B's, both random; experts and routers are not among them."""
    theirs = made(name, tmp_path, tiny_tokenizer, harsh=False)
    ours = opened(name, tmp_path)
    if ours is None:
        return
    names = attach_lora(ours.eval(), rank=4, alpha=8, exclude=LEFT_OUT.get(name, ()))
    peft = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    assert isinstance(peft, PeftModel)
    with_random_factors(ours, peft)
    ids, positions, targets = inputs()
    target_loss(ours, ids, positions, targets).backward()
    found = {path: (layer.lora_a.grad, layer.lora_b.grad) for path, layer in adapted_layers(ours)}
    expected = peft_gradients(peft, ids, targets)
    assert found.keys() == expected.keys() == set(names)
    ours_off = worst_difference(found, expected)
    if ours_off > 5e-6:  # float32's own roundings on another machine: then peft must be as far from float64
        reference = peft_gradients(in_float64(peft), ids, targets)
        assert worst_difference(found, reference) <= 2 * worst_difference(expected, reference)


def in_float64(model: PeftModel) -> PeftModel:
    """A copy; torch multiplies groups of matrices in 32 bits at most, so experts go one by one."""
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    base = exact.get_base_model()
    assert isinstance(base, PreTrainedModel)
    base.set_experts_implementation("eager")
    return exact


def with_random_factors(ours: PreTrainedModel, theirs: PeftModel) -> None:
    """The same A and B in both, none of them 0."""
    generator = torch.Generator().manual_seed(3)
    for path, layer in adapted_layers(ours):
        for own, name in ((layer.lora_a, "lora_A"), (layer.lora_b, "lora_B")):
            own.data.normal_(0, 0.1, generator=generator)
            theirs.get_base_model().get_parameter(f"{path}.{name}.default.weight").data.copy_(own)


Gradients = dict[str, tuple[Tensor | None, Tensor | None]]


def peft_gradients(model: PeftModel, ids: Tensor, targets: Tensor) -> Gradients:
    """Layer path → those of A and B, of the summed loss."""
    labels = ids.masked_fill(~targets, -100)
    (model.eval()(input_ids=ids, labels=labels, use_cache=False).loss * targets.sum()).backward()
    modules = dict[str, Any](model.get_base_model().named_modules())
    return {
        path: (module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad)
        for path, module in modules.items()
        if hasattr(module, "lora_A")
    }


def worst_difference(found: Gradients, expected: Gradients) -> float:
    """The largest, against the largest of its tensor."""
    differences = []
    for path, pair in expected.items():
        for one, other in zip(found[path], pair, strict=True):
            assert one is not None and other is not None and other.abs().max() > 0, path
            differences.append(((one.double() - other.double()).abs().max() / other.double().abs().max()).item())
    return max(differences)
