"""LoRA+: the learning rate of every trained parameter is peft's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from entrenar.core.config import load_config
from entrenar.lora.attach import attach_lora, trained_parameters
from entrenar.opening.load import load
from entrenar.optim.groups import LR_RATIO
from entrenar.recipes.config import RunConfig
from entrenar.recipes.train import make_optimizer

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")]
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def test_every_rate_is_pefts(make_config: Callable[..., Path], tiny_model_dir: Path) -> None:
    config = load_config(RunConfig, make_config(**{"optimizer.lora_plus_ratio": 16.0}))
    lr = config.optimizer.lr
    model, _ = load(str(tiny_model_dir), "none", dtype="float32")
    attach_lora(model, rank=4, alpha=8, targets=TARGETS)
    names = {id(parameter): name for name, parameter in trained_parameters(model)}
    ours = {
        names[id(parameter)]: group[LR_RATIO] * lr
        for group in make_optimizer(config, model).param_groups
        for parameter in group["params"]
    }
    theirs_model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    )
    optimizer = create_loraplus_optimizer(theirs_model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=16.0)
    their_names = {id(parameter): name for name, parameter in theirs_model.named_parameters()}
    theirs = {
        _ours(their_names[id(parameter)]): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert ours == pytest.approx(theirs)
    assert len(set(theirs.values())) == 3


def _ours(name: str) -> str:
    for theirs, own in (("lora_embedding_A", "lora_a"), ("lora_embedding_B", "lora_b"), ("lora_A", "lora_a"),
                        ("lora_B", "lora_b")):  # fmt: skip
        name = name.replace(theirs, own)
    return name.removeprefix("base_model.model.").replace(".default.weight", "").replace(".default", "")
