"""How far the steps of an export are from the model that was trained: KL divergence and perplexity on a text."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.lora.attach import adapted_layers
from entrenar.lora.embedding import EmbeddingLoRALayer
from entrenar.lora.fusing import fused_weight
from entrenar.lora.low_rank import AdapterLayer

_LARGEST_LOSS = 700.0  # nats a token; e to more is no float


@dataclass(frozen=True)
class ExportStep:
    """One step: mean KL(live ‖ step) in nats a token, and the step's own perplexity."""

    step: str
    kl: float
    perplexity: float


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of every next token after each of ids (T,): (T − 1, V) float32, on the CPU."""
    return model(input_ids=ids[None, :-1].to(model.device), use_cache=False).logits[0].float().log_softmax(-1).cpu()


def fidelity(step: str, live: Tensor, other: Tensor, ids: Tensor) -> ExportStep:
    """Compare log-probabilities (T − 1, V) with the live model's, on ids (T,)."""
    kl = F.kl_div(other, live, reduction="none", log_target=True).sum(-1).mean().item()
    loss = F.nll_loss(other, ids[1:]).item()
    return ExportStep(step, kl, math.exp(loss) if loss < _LARGEST_LOSS else math.inf)


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Let every adapted layer compute with its fused float32 weight, made each time it is used."""
    hooks = [layer.register_forward_hook(_with_fused_weight) for _, layer in adapted_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with_fused_weight(layer: AdapterLayer, args: tuple[Tensor], output: Tensor) -> Tensor:
    x, weight = args[0], fused_weight(layer).to(output.dtype)
    if isinstance(layer, EmbeddingLoRALayer):
        return F.embedding(x, weight) * getattr(layer.base, "embed_scale", 1.0)
    return F.linear(x, weight.t() if layer.is_transposed else weight, layer.base_bias())
