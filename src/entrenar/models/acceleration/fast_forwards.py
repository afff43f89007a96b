"""Faster forwards for the modules transformers builds its models of: norms, gated MLPs and the output head here, then
attention (fast_attention.py) and whole decoder layers (fast_layers.py).

A module is recognised by what it is seen to do, not by a name: it keeps its parameters, its children and its place, and
gets another forward only after that has agreed with its class's on numbers. Whatever is not recognised, or does not
agree, stays as it is.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.models.acceleration.agreement import agree, sample
from entrenar.models.acceleration.fast_attention import use_fast_attention
from entrenar.models.acceleration.fast_layers import use_fast_layers
from entrenar.models.acceleration.module_forwards import GatedMlpForward, HeadForward, NormForward
from entrenar.models.acceleration.recognised import gated_mlp_kind, norm_kind
from entrenar.models.acceleration.swapped import FastForward, swap

_LOG = logging.getLogger(__name__)


def use_fast_forwards(model: PreTrainedModel) -> Counter[str]:
    """Give the model's modules faster forwards where they agree; how many of each kind got one."""
    counts = Counter[str]()
    for module in model.modules():
        for kind, candidate, samples in _candidates(module):
            counts[kind] += _install(module, candidate, samples)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        counts["heads"] += _install(head, HeadForward(), [sample(head.in_features, head.weight)])
    counts["attention"] = use_fast_attention(model)
    counts["layers"] = use_fast_layers(model)
    _LOG.info("faster forwards: %s", ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return counts


def _candidates(module: nn.Module) -> Iterable[tuple[str, FastForward, list[Tensor]]]:
    """Kind and forward of a module that was seen to compute what it does, and inputs to confirm it with."""
    norm = norm_kind(module)
    if norm is not None:
        weight = cast(Any, module).weight
        yield "norms", NormForward(*norm), [sample(len(weight), weight)]
    features = getattr(getattr(module, "gate_proj", None), "in_features", None)
    kind = gated_mlp_kind(module) if isinstance(features, int) else None
    if kind is not None and isinstance(features, int):
        yield "gated MLPs", GatedMlpForward(kind), [sample(features, _computed_like(module))]


def _install(module: nn.Module, candidate: FastForward, samples: list[Tensor]) -> bool:
    """Give the module the candidate if it agrees with its class's forward on every sample, in the run's dtype."""
    with torch.no_grad():
        try:
            agrees = all(agree(candidate(module, x), type(module).forward(module, x)) for x in samples)
        except Exception:  # one of them takes something else: not the module it looked like
            return False
    if agrees:
        swap(module, candidate)
    return agrees


def _computed_like(module: nn.Module) -> Tensor:
    """A tensor of the device and of the dtype a module's norms and biases are in, or what its neighbours compute in."""
    parameters = list(module.parameters())
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())
    return torch.empty(0, dtype=dtype, device=parameters[0].device)
