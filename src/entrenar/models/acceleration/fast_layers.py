"""Decoder layers whose two halves run as one native call each on a CPU (layers/residual_blocks.py), and as what stands
before and behind attention on a GPU (layers/composed_blocks.py).

h + attention(norm(h)), then h + mlp(norm(h)): Llama and the many that are built like it. As in fast_forwards.py, what
counts is the structure, and then that the numbers agree; a call that asks for more (dropout, hooks on the parts; on a
CPU a cache or a mask of another kind) goes the class's own way.
"""

from dataclasses import dataclass
from functools import partial
from operator import is_not
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers import composed_blocks, residual_blocks
from entrenar.layers.adapted_native import Member
from entrenar.layers.quantized_linear import can_join, member_of
from entrenar.layers.recompute import Recompute
from entrenar.layers.residual_blocks import AttentionBlock, MlpBlock, Norm, decoder_layer, serves
from entrenar.models.acceleration import attention
from entrenar.models.acceleration.agreement import TRIAL_TOKENS, Forward, agree, recorded
from entrenar.models.acceleration.probes import attention_structure, is_residual_layer, rotates_halves
from entrenar.models.acceleration.projected import Projected, rotating_by
from entrenar.models.acceleration.recognised import activation_of, norm_of
from entrenar.ops.attention import native_width

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_KEEP = "_entrenar_keep"  # attribute of a layer
_BLOCKS = "_blocks"  # attribute of its description: the blocks of the members and norms met last


# Before attention, before the MLP, of the heads of q and of k.
_Norms = tuple[Norm, Norm, Norm | None, Norm | None]


@dataclass(frozen=True)
class _Layer:
    """What a decoder layer computes, the linear layers aside: those may be adapted later."""

    norms: "_Norms"  # as they were when the layer was recognised
    activation: str
    width: int
    scale: float
    rotates: bool
    attend: Forward  # the forward of attention's class, but that it does not rotate


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
        isinstance(vars(layer).get("forward"), MethodType) and all(map(can_join, _linears(layer))) for layer in layers
    )


def set_recompute(layer: nn.Module, choice: Recompute) -> None:
    """Say what a layer's blocks keep for their backward; DEAR if nothing is said."""
    setattr(layer, _KEEP, choice)


def _linears(layer: Any) -> list[nn.Module]:
    attention, mlp = (layer._modules[name]._modules for name in ("self_attn", "mlp"))  # quicker than as attributes
    return [attention[name] for name in _PROJECTIONS] + [mlp[name] for name in _GATED]


def _looks_right(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if children.keys() != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return False
    inside = children["self_attn"], children["mlp"]
    heads, gated = (dict(each.named_children()).keys() for each in inside)
    own = any(True for each in (module, *inside) for _ in each.parameters(recurse=False))
    known = heads in ({*_PROJECTIONS}, {*_PROJECTIONS, "q_norm", "k_norm"})
    known = known and {*_GATED} <= gated <= {*_GATED, "act_fn"}
    return known and isinstance(getattr(inside[0], "head_dim", None), int) and not own


def _describe(module: Any, kwargs: dict[str, Any]) -> _Layer | None:
    """What a layer is whose parts are recognised and put together in the known way; None for any other.

    Args:
        kwargs: of a call.
    """
    norms = norm_of(module.input_layernorm), norm_of(module.post_attention_layernorm)
    names = ("q_norm", "k_norm")
    heads = [norm_of(getattr(module.self_attn, name)) if hasattr(module.self_attn, name) else None for name in names]
    activation = activation_of(module.mlp)
    missing = hasattr(module.self_attn, "q_norm") and None in heads
    attend = rotating_by(type(module.self_attn).forward, _not_rotated)
    if norms[0] is None or norms[1] is None or activation is None or missing or attend is None:
        return None
    try:
        structure = attention_structure(module.self_attn, kwargs) if is_residual_layer(module, kwargs) else None
    except Exception:  # it makes more of its parts than to hand tensors on
        return None
    if structure is None:
        return None
    width = module.self_attn.head_dim
    four = norms[0], norms[1], heads[0], heads[1]
    return _Layer(four, activation, width, structure.scale, structure.rotates, attend)


def _install(module: nn.Module, inputs: list[Tensor], kwargs: dict[str, Any]) -> bool:
    layer = _describe(module, kwargs)
    if layer is None or (layer.rotates and not _is_ours(module, kwargs)):
        return False
    own = type(module).forward
    ways = (_run, _run_own_attention) if serves(inputs[0]) else (_run_own_attention,)
    with torch.no_grad():
        expected = [own(module, x, **kwargs) for x in inputs]
        found = [way(module, layer, x, kwargs) for way in ways for x in inputs]
    both = zip(found, expected * len(ways), strict=True)
    if not all(one is not None and agree(one, other) for one, other in both):
        return False
    module.forward = MethodType(partial(_layer_forward, layer=layer), module)
    return True


def _is_ours(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the layer's rotation is the one that the blocks know."""
    return rotates_halves(module.self_attn, kwargs["position_embeddings"][0].shape[-1])


def _layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, layer: _Layer, **kwargs: Any) -> Any:
    for way in () if args else (_run, _run_own_attention):
        found = way(self, layer, hidden_states, kwargs)
        if found is not None:
            return found
    return type(self).forward(self, hidden_states, *args, **kwargs)


def _run(module: Any, layer: _Layer, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's result (B, T, C), or None where the call or the layer's state asks for more than the blocks do."""
    linears = _linears(module)
    wanted = _attention_inputs(module, layer, h, kwargs) if _is_native(layer, h) else None
    norms = None if wanted is None else _norms(module, layer)
    if wanted is None or norms is None or not all(map(can_join, linears)):
        return None
    rotation, starts = wanted
    keep = getattr(module, _KEEP, Recompute.CHEAP) if torch.is_grad_enabled() else Recompute.ALL
    first, second = _blocks(layer, linears, norms)
    return decoder_layer(h, first, second, rotation, starts, keep)


def _run_own_attention(module: Any, layer: _Layer, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The result where the class's forward attends: on a GPU, and on a CPU where attention asks for more than its block
    does, with a cache, and nobody asks for gradients.
    """
    linears, rotation, trains = _linears(module), kwargs.get("position_embeddings"), torch.is_grad_enabled()
    composed = composed_blocks.serves(h)
    served = composed or (_is_native(layer, h) and not trains)
    again = trains and module.training and getattr(module, "gradient_checkpointing", False)
    plain = served and not _is_watched(module) and all(map(can_join, linears))
    plain = plain and not (again and kwargs.get("past_key_values") is not None)  # it would be written to twice
    norms = _norms(module, layer) if plain else None
    if norms is None or (layer.rotates and rotation is None):
        return None
    parts = composed_blocks if composed else residual_blocks
    run = partial(_around_attention, module, layer, _blocks(layer, linears, norms), parts, kwargs)
    # The class's own forward would see to that.
    return module._gradient_checkpointing_func(run, h) if again else run(h)


def _around_attention(
    module: Any, layer: _Layer, blocks: tuple[AttentionBlock, MlpBlock], parts: Any, kwargs: dict[str, Any], h: Tensor
) -> Tensor:
    """The layer's result out of `parts`, one of the two modules that have what stands before and behind attention."""
    first, second = blocks
    rotation = _contiguous(kwargs["position_embeddings"]) if layer.rotates else None
    h, q, k, v = parts.before_attention(h, first, rotation)
    # The class's forward finds all of it done but to attend.
    projected = Projected(module.self_attn, q, k, v, q_norm=_same, k_norm=_same, o_proj=_same)
    attended = layer.attend(projected, hidden_states=h, **kwargs)[0]
    return parts.after_attention(h, attended, first.output, second)


def _same(x: Tensor) -> Tensor:
    return x


def _not_rotated(q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def _blocks(layer: _Layer, linears: list[nn.Module], norms: _Norms) -> tuple[AttentionBlock, MlpBlock]:
    members = list(map(member_of, linears))
    made_of = [*members, *norms]
    kept: tuple[list[Member | Norm | None], AttentionBlock, MlpBlock] | None = layer.__dict__.get(_BLOCKS)
    if kept is None or any(map(is_not, kept[0], made_of)):
        q, k, v, output, gate, up, down = members
        first = AttentionBlock(norms[0], q, k, v, output, layer.width, layer.scale, *norms[2:])
        kept = made_of, first, MlpBlock(norms[1], gate, up, down, layer.activation)
        layer.__dict__[_BLOCKS] = kept
    return kept[1], kept[2]


def _is_native(layer: _Layer, h: Tensor) -> bool:
    return serves(h) and native_width(layer.width)


def _norms(module: Any, layer: _Layer) -> _Norms | None:
    """The layer's norms as they are now; None where one has become something else, or is trained at present."""
    own, attention = module._modules, module._modules["self_attn"]._modules
    parts = own["input_layernorm"], own["post_attention_layernorm"], attention.get("q_norm"), attention.get("k_norm")
    trains, found = torch.is_grad_enabled(), []
    for part, norm in zip(parts, layer.norms, strict=True):
        if norm is not None and part._parameters.get("weight") is not norm.weight:
            norm = norm_of(part)
            if norm is None:
                return None
        if norm is not None and trains and norm.weight.requires_grad:
            return None
        found.append(norm)
    return found[0], found[1], found[2], found[3]


def _is_watched(module: Any) -> bool:
    """Whether a part has hooks, which must be called."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module._modules.values())


def _attention_inputs(
    module: Any, layer: _Layer, h: Tensor, kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None] | None:
    """Rotation and first keys of a call, if it is one of the blocks' kind."""
    mask, rotation = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
    own = module._modules["self_attn"]
    starts = None if mask is None else attention.first_keys(mask)
    plain = (
        kwargs.get("past_key_values") is None
        and not kwargs.get("use_cache")
        and (mask is None or (starts is not None and starts.shape == h.shape[:2]))
        and own.config._attn_implementation == attention.NAME
        and not (module.training and getattr(own, "attention_dropout", 0.0))
        and not _is_watched(module)
    )
    if not plain or (layer.rotates and rotation is None):
        return None
    return (_contiguous(rotation) if layer.rotates else None), starts


def _contiguous(rotation: Any) -> tuple[Tensor, Tensor]:
    cos, sin = rotation
    return cos.contiguous(), sin.contiguous()


def _trial(model: PreTrainedModel, size: float) -> Tensor:
    """Random hidden states (1, 4, C) of a size."""
    width = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(width)
    return (torch.randn(1, TRIAL_TOKENS, width, generator=generator) * size).to(model.device, model.dtype)
