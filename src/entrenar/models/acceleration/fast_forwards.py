"""Faster forwards for the modules transformers builds its models of: norms, gated MLPs, attention.

A module is recognised by its structure, not by its name or class: it keeps its parameters, its children and its place,
and gets a forward of its own only after that has agreed with the class's on numbers. Whatever is not recognised, or
does not agree, stays as it is.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers.quantized_linear import grouped_linears
from entrenar.layers.recompute import with_recipe
from entrenar.models.acceleration import attention
from entrenar.models.acceleration.agreement import Forward, agree, recorded, sample
from entrenar.models.acceleration.fast_layers import use_fast_layers
from entrenar.models.acceleration.probes import projects_its_input, rotate_both, rotates_halves
from entrenar.models.acceleration.projected import Projected, rotating_by
from entrenar.models.acceleration.recognised import gated_mlp_kind, norm_kind
from entrenar.ops.gated_activation import gated_activation
from entrenar.ops.rms_norm import rms_norm

_LOG = logging.getLogger(__name__)


def use_fast_forwards(model: PreTrainedModel) -> Counter[str]:
    """Give the model's modules faster forwards where they agree; how many of each kind got one."""
    counts = Counter[str]()
    for module in model.modules():
        for kind, candidate, samples in _told(module):
            counts[kind] += _install(module, candidate, samples)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        counts["heads"] += _install(head, head_forward, [sample(head.in_features, head.weight)])
    counts["attention"] = _use_fast_attention(model)
    counts["layers"] = use_fast_layers(model)
    _LOG.info("faster forwards: %s", ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return counts


def _told(module: nn.Module) -> Iterable[tuple[str, Forward, list[Tensor]]]:
    """Kind and forward of a module whose class and numbers say what it computes, and inputs to confirm it with."""
    norm = norm_kind(module)
    if norm is not None:
        weight = cast(Any, module).weight
        yield "norms", partial(norm_forward, eps=norm[0], offset=norm[1]), [sample(len(weight), weight)]
    features = getattr(getattr(module, "gate_proj", None), "in_features", None)
    kind = gated_mlp_kind(module) if isinstance(features, int) else None
    if kind is not None and isinstance(features, int):
        yield "gated MLPs", partial(gated_mlp_forward, kind=kind), [sample(features, _computed_like(module))]


def norm_forward(self: Any, hidden_states: Tensor, *, eps: float, offset: float) -> Tensor:
    """An RMS norm's forward."""
    make = partial(_norm, eps=eps, offset=offset)
    return with_recipe(make(hidden_states, self.weight), make, hidden_states, self.weight)


def _norm(x: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
    return rms_norm(x, weight, eps, offset)


def gated_mlp_forward(self: Any, x: Tensor, *, kind: str) -> Tensor:
    """A gated MLP's forward."""
    gate, up = grouped_linears(x, (self.gate_proj, self.up_proj))
    make = partial(gated_activation, kind=kind)
    return self.down_proj(with_recipe(make(gate, up), make, gate, up))


def head_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """An output head's forward, over rows that lie together.

    `generate` asks for the logits of each prompt's last token, a slice whose strides send PyTorch's bfloat16 product to
    a loop of single numbers (torch 2.13 on a CPU): 2.7 s in place of 6 ms for 32 prompts and SmolLM2's vocabulary.
    """
    rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
    return type(self).forward(self, rows).view(*hidden_states.shape[:-1], self.out_features)


def _use_fast_attention(model: PreTrainedModel) -> int:
    """Our attention for this model; its projections in groups, our rotation; how many modules got a forward."""
    modules = [module for module in model.modules() if _is_attention(module)]
    if not modules or model.config._attn_implementation != "sdpa":
        return 0
    trials = recorded(model, modules)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    if not all(agree(module(*args, **kwargs), output) for module, args, kwargs, output in trials):
        model.set_attn_implementation("sdpa")
        return 0
    return sum(_install_attention(*trial) for trial in trials)


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))


def _install_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    original, rotation = type(module).forward, kwargs.get("position_embeddings")
    if not projects_its_input(module, args, kwargs):
        return False
    ours = isinstance(rotation, tuple) and rotates_halves(module, rotation[0].shape[-1])
    forward = (rotating_by(original, rotate_both) if ours else None) or original
    candidate = partial(_grouped_attention_forward, forward=forward)
    with torch.no_grad():
        try:
            agrees = agree(candidate(module, *args, **kwargs), output)
        except Exception:  # it is not called as those known here are
            return False
    if agrees:
        module.forward = MethodType(candidate, module)
    return agrees


def _grouped_attention_forward(
    self: nn.Module, hidden_states: Tensor, *args: Any, forward: Forward, **kwargs: Any
) -> Any:
    """The class's forward over projections that are computed together."""
    q, k, v = grouped_linears(hidden_states, [self.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")])
    return forward(Projected(self, q, k, v), hidden_states, *args, **kwargs)


def _install(module: nn.Module, candidate: Forward, samples: list[Tensor]) -> bool:
    """Give the module the candidate if it agrees with its class's forward on every sample, in the run's dtype."""
    with torch.no_grad():
        try:
            agrees = all(agree(candidate(module, each), type(module).forward(module, each)) for each in samples)
        except Exception:  # one of them takes something else: not the module it looked like
            return False
    if agrees:
        module.forward = MethodType(candidate, module)
    return agrees


def _computed_like(module: nn.Module) -> Tensor:
    """A tensor of the device and of the dtype a module's norms and biases are in, or what its neighbours compute in."""
    parameters = list(module.parameters())
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.get_default_dtype())
    return torch.empty(0, dtype=dtype, device=parameters[0].device)
