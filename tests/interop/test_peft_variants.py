"""Variants of LoRA against peft: forward, gradients, fused weights, and each reads the other's directory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::peft.utils.warning.PeftWarning"),
]
IDS = torch.arange(14).view(2, 7)
MLP = ["up_proj", "down_proj"]


def llama(*, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


# Name → what makes the model, our arguments, peft's.
VARIANTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "rslora": (llama, {"rslora": True}, {"use_rslora": True}),
    "dora": (llama, {"dora": True}, {"use_dora": True}),
    "patterns": (
        llama,
        {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {r"layers\.1\.mlp\..*": 3.0}},
        {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {r"layers\.1\.mlp\..*": 3.0}},
    ),
    "bias of the layers": (llama, {"bias": "lora_only", "targets": ["q_proj"]}, {"bias": "lora_only"}),
    "every bias": (llama, {"bias": "all", "targets": ["q_proj"]}, {"bias": "all"}),
    "saved head": (llama, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "saved norm": (llama, {"modules_to_save": ["model.norm"]}, {"modules_to_save": ["model.norm"]}),
    "embedding": (llama, {"targets": ["embed_tokens", "up_proj"]}, {}),
    "conv1d": (gpt2, {"targets": ["c_attn", "c_proj"]}, {"fan_in_fan_out": True}),
    "conv1d dora": (gpt2, {"targets": ["c_attn"], "dora": True}, {"fan_in_fan_out": True, "use_dora": True}),
    "pissa": (llama, {"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "everything": (
        llama,
        {"dora": True, "rslora": True, "rank_pattern": {"q_proj": 2}, "targets": ["q_proj", "up_proj"]},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def ours(name: str) -> PreTrainedModel:
    make, changes, _ = VARIANTS[name]
    model = make()
    torch.manual_seed(1)
    attach_lora(model, **({"rank": 4, "alpha": 6, "targets": MLP} | changes))
    return model


def trained(name: str) -> PreTrainedModel:
    """Ours, everything that is trained moved a little."""
    model = ours(name)
    move(model)
    return model


def move(model: nn.Module) -> None:
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1


def theirs(name: str) -> PeftModel:
    make, changes, options = VARIANTS[name]
    targets = changes.get("targets", MLP)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)
    model = get_peft_model(make(), config).eval()
    assert isinstance(model, PeftModel)
    return model


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@every_variant
def test_peft_loads_ours(name: str, tmp_path: Path) -> None:
    model = trained(name)
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(VARIANTS[name][0](), tmp_path / "adapter").eval()
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)
    assert (logits(model) - logits(VARIANTS[name][0]())).abs().max() > 0.01


@every_variant
def test_we_load_pefts(name: str, tmp_path: Path) -> None:
    peer = theirs(name)
    move(peer)
    peer.save_pretrained(str(tmp_path / "adapter"))
    model = VARIANTS[name][0]()
    load_adapter(model, tmp_path / "adapter")
    assert torch.allclose(logits(model.eval()), logits(peer), atol=2e-5)


@every_variant
def test_gradients_and_fused_weights_are_pefts(name: str, tmp_path: Path) -> None:
    peer = theirs(name)
    move(peer)
    peer.save_pretrained(str(tmp_path / "adapter"))
    model = VARIANTS[name][0]()
    load_adapter(model, tmp_path / "adapter")
    for each in (peer, model):
        each(input_ids=IDS, labels=IDS).loss.backward()
    trained_here, trained_there = (sorted(norms(each)) for each in (model, peer))
    assert trained_here == pytest.approx(trained_there, rel=1e-3, abs=1e-5)
    merged = peer.merge_and_unload()
    for path, layer in adapted_layers(model):
        fused = layer.merge_to_f32()
        fused = fused.t() if layer.is_transposed else fused
        assert torch.allclose(fused, merged.get_submodule(path).weight, atol=1e-5)


def losses(model: nn.Module, steps: int = 3) -> list[float]:
    """Of steps of plain gradient descent, in which nothing is remembered but the parameters."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    found: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@every_variant
def test_what_is_trained_here_and_saved_is_trained_on_by_peft(name: str, tmp_path: Path) -> None:
    model = ours(name)
    before = losses(model)
    save_adapter(model, tmp_path / "adapter")
    peer = PeftModel.from_pretrained(VARIANTS[name][0](), tmp_path / "adapter", is_trainable=True).eval()
    there, here = losses(peer), losses(model)
    assert there == pytest.approx(here, rel=1e-4)
    assert there[-1] < before[0]


@every_variant
def test_what_peft_trained_and_saved_is_trained_on_here(name: str, tmp_path: Path) -> None:
    peer = theirs(name)
    before = losses(peer)
    peer.save_pretrained(str(tmp_path / "adapter"))
    model = VARIANTS[name][0]()
    load_adapter(model, tmp_path / "adapter")
    here, there = losses(model.eval()), losses(peer)
    assert here == pytest.approx(there, rel=1e-4)
    assert here[-1] < before[0]


@pytest.mark.parametrize(("rank", "alpha"), [(1, 6), (32, 6), (4, 0)])
def test_the_smallest_and_the_largest_rank_and_alpha_0(tmp_path: Path, rank: int, alpha: int) -> None:
    """32 is the narrower side of the layers."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=MLP, task_type="CAUSAL_LM")
    peer = get_peft_model(llama(), config).eval()
    move(peer)
    peer.save_pretrained(str(tmp_path / "theirs"))
    model = llama()
    load_adapter(model, tmp_path / "theirs")
    assert torch.allclose(logits(model), logits(peer), atol=2e-5)
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert torch.allclose(logits(again), logits(model), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_16_bits_of_an_older_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    """The keys that peft wrote in 2023, and its tensors as a 16-bit training leaves them."""
    peer = theirs("rslora")
    move(peer)
    peer.save_pretrained(str(tmp_path / "adapter"))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    file = tmp_path / "adapter" / "adapter_config.json"
    old = ("auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
           "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r",
           "revision", "target_modules", "task_type")  # fmt: skip
    config = {key: value for key, value in json.loads(file.read_text()).items() if key in old}
    file.write_text(json.dumps(config))
    model = llama()
    load_adapter(model, tmp_path / "adapter")
    expected = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert torch.allclose(logits(model), logits(expected), atol=2e-5)


def norms(model: nn.Module) -> list[float]:
    """Norm of the gradient of every trained parameter, whatever it is called."""
    return [p.grad.norm().item() for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_a_start_at_random_has_pefts_spread(init: str) -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    attach_lora(model, rank=64, init=init)
    peer = get_peft_model(
        nn.Sequential(nn.Linear(400, 300)),
        LoraConfig(r=64, target_modules=["0"], init_lora_weights="gaussian" if init == "gaussian" else True),
    )
    a = dict(peer.named_parameters())["base_model.model.0.lora_A.default.weight"]
    ((_, layer),) = adapted_layers(model)
    assert layer.lora_a.std().item() == pytest.approx(a.std().item(), rel=0.05)


def test_pissas_factors_are_pefts() -> None:
    """Up to the sign of each direction, which the SVD leaves open."""
    peer = dict(theirs("pissa").get_base_model().named_modules())
    for path, layer in adapted_layers(ours("pissa")):
        other: Any = peer[path]
        product = layer.lora_b @ layer.lora_a
        assert torch.allclose(product, other.lora_B["default"].weight @ other.lora_A["default"].weight, atol=1e-5)
        assert torch.allclose(layer.base_to_f32(), other.base_layer.weight, atol=1e-5)


def test_a_tied_embedding_that_is_saved_stays_tied_in_both(tmp_path: Path) -> None:
    model = llama(tied=True)
    attach_lora(model, rank=4, targets=MLP, modules_to_save=["embed_tokens"])
    move(model)
    assert is_tied(model)
    save_adapter(model, tmp_path / "ours")
    peer = PeftModel.from_pretrained(llama(tied=True), tmp_path / "ours").eval()
    assert torch.allclose(logits(peer), logits(model), atol=2e-5)
    peer.save_pretrained(str(tmp_path / "theirs"))
    again = llama(tied=True)
    load_adapter(again, tmp_path / "theirs")
    assert torch.allclose(logits(again), logits(model), atol=2e-5)
    assert is_tied(again)


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_lora_plus_has_pefts_groups() -> None:
    from peft.optimizers import create_loraplus_optimizer

    from entrenar.lora.attach import trained_parameters
    from entrenar.optim.groups import lora_plus_groups

    options: dict[str, Any] = {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16}
    peer = create_loraplus_optimizer(theirs("dora"), **options)
    theirs_by_lr = {
        group["lr"]: sum(p.numel() for p in group["params"]) for group in peer.param_groups if group["params"]
    }
    groups = lora_plus_groups(trained_parameters(ours("dora")), 16)
    assert {1e-3 * group["lr_ratio"]: sum(p.numel() for p in group["params"]) for group in groups} == theirs_by_lr
