"""Faster attention modules: our attention for the model, projections that are computed together, and our rotation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers.quantized_linear import grouped_linears
from entrenar.models.acceleration import attention
from entrenar.models.acceleration.agreement import Forward, agree, recorded
from entrenar.models.acceleration.attention_structure import projections_of_input
from entrenar.models.acceleration.proxy import ProjectedAttention
from entrenar.models.acceleration.rotation import rotate_both, rotates_halves, rotating_by
from entrenar.models.acceleration.swapped import FastForward, swap

_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


def use_fast_attention(model: PreTrainedModel) -> int:
    """Our attention for this model; its projections in groups, our rotation; how many modules got a forward."""
    modules = [module for module in model.modules() if all(hasattr(module, name) for name in _PARTS)]
    if not modules or model.config._attn_implementation != "sdpa":
        return 0
    trials = recorded(model, modules)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    if not all(agree(module(*args, **kwargs), output) for module, args, kwargs, output in trials):
        model.set_attn_implementation("sdpa")
        return 0
    return sum(_install(*trial) for trial in trials)


@dataclass(frozen=True)
class GroupedAttentionForward(FastForward):
    """The class's forward over projections that are computed together.

    Args:
        forward: the class's, perhaps with our rotation in place of its own.
    """

    forward: Forward

    def __call__(self, module: nn.Module, /, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the class's gives: (B, T, C), and what it adds."""
        q, k, v = grouped_linears(hidden_states, [module.get_submodule(name) for name in _PARTS[:3]])
        return self.forward(ProjectedAttention(module, q, k, v), hidden_states, *args, **kwargs)


def _install(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    projections = projections_of_input(module, args, kwargs)
    if projections is None:
        return False
    forward, rotation, width = type(module).forward, projections.rotation, getattr(module, "head_dim", None)
    if rotation is not None and isinstance(width, int):
        rotated = kwargs["position_embeddings"][0].shape[-1]
        if rotates_halves(rotation.rotate, width, rotated):
            forward = rotating_by(forward, rotation, rotate_both)
    candidate = GroupedAttentionForward(forward)
    with torch.no_grad():
        try:
            agrees = agree(candidate(module, *args, **kwargs), output)
        except Exception:  # it is not called as those known here are
            return False
    if agrees:
        swap(module, candidate)
    return agrees
