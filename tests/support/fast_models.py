"""Tiny models that are quantized and adapted, what they are run on, and the gradients of their factors."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.attach import attach_lora
from entrenar.lora.saved import trainable_copies
from entrenar.quant.tensor import quantize

IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[*range(13), *range(7)], [*range(4), *range(9), *range(7)]])


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """The linear layers but the head in nf4."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, child = name.rpartition(".")
            packed = QuantizedLinear(quantize(module.weight, format="nf4", block_size=16), module.bias)
            setattr(model.get_submodule(parent), child, packed)
    return model


# Built as Llama is; granite scales its residuals, the others have other norms, projections or orders.
ALIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma")


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    """In nf4, with adapters that do something."""
    quantized(model)
    torch.manual_seed(0)
    attach_lora(model, rank=4, alpha=8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def train_norms(model: PreTrainedModel, name: str) -> None:
    """Replace the norms of a name by trained copies, as modules_to_save does, and change them."""
    for path, trained in trainable_copies(model, [name], []).items():
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, trained)
        nn.init.uniform_(trained.get_parameter("weight"), 0.5, 2.0, generator=torch.Generator().manual_seed(1))


def gradients(model: PreTrainedModel, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the gradients of all factors as one vector."""
    model.zero_grad()
    found = model(input_ids=IDS, use_cache=False, **inputs).logits.float()
    found.square().mean().backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
