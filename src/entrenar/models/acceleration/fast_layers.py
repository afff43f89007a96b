"""Which decoder layers get the faster forward of layer_forward.py.

Those of Llama's structure: h + attention(norm(h)), then h + mlp(norm(h)). As in fast_forwards.py a layer is not looked
up by its class: a trial run shows its structure, and then its numbers must agree.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers import composed_blocks
from entrenar.layers.quantized_linear import can_join
from entrenar.layers.recompute import Recompute
from entrenar.layers.residual_blocks import serves
from entrenar.models.acceleration import attention
from entrenar.models.acceleration.agreement import TRIAL_TOKENS, agree, recorded
from entrenar.models.acceleration.attention_structure import attention_structure
from entrenar.models.acceleration.layer_forward import GATED, PROJECTIONS, RECOMPUTE, LayerForward, linears_of
from entrenar.models.acceleration.layer_structure import is_residual_layer
from entrenar.models.acceleration.module_forwards import activation_of, norm_of
from entrenar.models.acceleration.rotation import not_rotated, rotates_halves, rotating_by
from entrenar.models.acceleration.swapped import fast_forward_of, swap


def use_fast_layers(model: PreTrainedModel) -> int:
    """Give the model's decoder layers such forwards where they agree; how many got one."""
    layers = [module for module in model.modules() if _looks_right(module)]
    trial = _trial(model, 1.0)
    served = serves(trial) or composed_blocks.serves(trial)
    if not layers or model.config._attn_implementation != attention.NAME or not served:
        return 0
    inputs = [_trial(model, size) for size in (1.0, 0.03)]  # beside the small one the residual hardly counts
    trials = recorded(model, layers)
    return sum(_install(module, inputs, kwargs) for module, args, kwargs, _ in trials if len(args) == 1)


def serve(model: nn.Module) -> bool:
    """Whether the model's decoder layers run so in training, as they now are."""
    layers = [module for module in model.modules() if _looks_right(module)]
    return bool(layers) and all(
        isinstance(fast_forward_of(layer), LayerForward) and all(map(can_join, linears_of(layer))) for layer in layers
    )


def set_recompute(layer: nn.Module, choice: Recompute) -> None:
    """Say what a layer's halves compute again in their backward; CHEAP if nothing is said."""
    RECOMPUTE.hang(layer, choice)


def _looks_right(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if children.keys() != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return False
    inside = children["self_attn"], children["mlp"]
    heads, gated = (dict(part.named_children()).keys() for part in inside)
    direct = any(True for part in (module, *inside) for _ in part.parameters(recurse=False))
    known = heads in ({*PROJECTIONS}, {*PROJECTIONS, "q_norm", "k_norm"})
    known = known and {*GATED} <= gated <= {*GATED, "act_fn"}
    return known and isinstance(getattr(inside[0], "head_dim", None), int) and not direct


def _describe(module: Any, kwargs: dict[str, Any]) -> LayerForward | None:
    """The forward of a layer whose parts are recognised and put together in the known way; None for any other.

    Args:
        kwargs: of a call.
    """
    norms = norm_of(module.input_layernorm), norm_of(module.post_attention_layernorm)
    names = ("q_norm", "k_norm")
    heads = [norm_of(getattr(module.self_attn, name)) if hasattr(module.self_attn, name) else None for name in names]
    activation = activation_of(module.mlp)
    missing = hasattr(module.self_attn, "q_norm") and None in heads
    if norms[0] is None or norms[1] is None or activation is None or missing:
        return None
    try:
        structure = attention_structure(module.self_attn, kwargs) if is_residual_layer(module, kwargs) else None
    except Exception:  # it makes more of its parts than to hand tensors on
        return None
    if structure is None:
        return None
    rotation, width = structure.rotation, module.self_attn.head_dim
    if rotation is not None:
        rotated = kwargs["position_embeddings"][0].shape[-1]
        if not rotates_halves(rotation.rotate, width, rotated):
            return None
    attend = rotating_by(type(module.self_attn).forward, rotation, not_rotated)
    four = norms[0], norms[1], heads[0], heads[1]
    return LayerForward(four, activation, width, structure.scale, rotation is not None, attend)


def _install(module: nn.Module, inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    forward = _describe(module, kwargs)
    if forward is None:
        return False
    ways = (forward.run, forward.run_own_attention) if serves(inputs[0]) else (forward.run_own_attention,)
    with torch.no_grad():
        expected = [type(module).forward(module, x, **kwargs) for x in inputs]
        results = [way(module, x, kwargs) for way in ways for x in inputs]
    pairs = zip(results, expected * len(ways), strict=True)
    if not all(ours is not None and agree(ours, theirs) for ours, theirs in pairs):
        return False
    swap(module, forward)
    return True


def _trial(model: PreTrainedModel, size: float) -> Tensor:
    """Random hidden states (1, 4, C) of a size."""
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(width)
    return (torch.randn(1, TRIAL_TOKENS, width, generator=generator) * size).to(model.device, model.dtype)
