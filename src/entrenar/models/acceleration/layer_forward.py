"""A decoder layer's faster forward: its two halves as one native call each on a CPU (layers/residual_blocks.py), and as
what stands before and behind attention on a GPU (layers/composed_blocks.py).

A call that asks for more (dropout, hooks on the parts; on a CPU a cache or a mask of another kind) goes the class's own
way.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.core.attachment import Attachment
from entrenar.layers import composed_blocks, residual_blocks
from entrenar.layers.quantized_linear import can_join, member_of
from entrenar.layers.recompute import Recompute
from entrenar.layers.residual_blocks import AttentionBlock, MlpBlock, Norm, decoder_layer, serves
from entrenar.models.acceleration import attention
from entrenar.models.acceleration.agreement import Forward
from entrenar.models.acceleration.module_forwards import norm_of
from entrenar.models.acceleration.proxy import ProjectedAttention
from entrenar.models.acceleration.swapped import FastForward
from entrenar.native.cached import Cached, ids
from entrenar.ops.attention import native_width

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
# What a layer computes again in its backward.
RECOMPUTE = Attachment[Recompute]("recompute")
# Before attention, before the MLP, of the heads of q and of k.
Norms = tuple[Norm, Norm, Norm | None, Norm | None]


@dataclass(eq=False)
class LayerForward(FastForward):
    """A decoder layer's forward: what the layer computes, its linear layers aside, which may be adapted later.

    Args:
        norms: as they were when the layer was recognised. attend: the forward of attention's class, but that it does
            not rotate.
    """

    norms: Norms
    activation: str
    width: int
    scale: float
    rotates: bool
    attend: Forward
    _blocks: Cached[tuple[AttentionBlock, MlpBlock]] = field(default_factory=Cached, init=False)  # of what was met last

    def __call__(self, module: nn.Module, /, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, T, C) → (B, T, C), or what the class's own gives."""
        for way in () if args else (self.run, self.run_own_attention):
            result = way(module, hidden_states, kwargs)
            if result is not None:
                return result
        return type(module).forward(module, hidden_states, *args, **kwargs)

    def run(self, module: Any, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The result (B, T, C), or None where the call or the layer's state asks for more than the blocks do."""
        linears = linears_of(module)
        wanted = self._attention_inputs(module, h, kwargs) if self._is_native(h) else None
        norms = None if wanted is None else self._norms_now(module)
        if wanted is None or norms is None or not all(map(can_join, linears)):
            return None
        rotation, starts = wanted
        recompute = (RECOMPUTE.of(module) or Recompute.CHEAP) if torch.is_grad_enabled() else Recompute.ALL
        first, second = self._blocks_of(linears, norms)
        return decoder_layer(h, first, second, rotation, starts, recompute)

    def run_own_attention(self, module: Any, h: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """The result where the class's forward attends, or None.

        On a GPU that is always so; on a CPU where attention asks for more than its block does (a cache) and nobody asks
        for gradients.
        """
        linears, rotation, trains = linears_of(module), kwargs.get("position_embeddings"), torch.is_grad_enabled()
        composed = composed_blocks.serves(h)
        served = composed or (self._is_native(h) and not trains)
        again = trains and module.training and getattr(module, "gradient_checkpointing", False)
        plain = served and not _is_watched(module) and all(map(can_join, linears))
        plain = plain and not (again and kwargs.get("past_key_values") is not None)  # it would be written to twice
        norms = self._norms_now(module) if plain else None
        if norms is None or (self.rotates and rotation is None):
            return None
        parts = composed_blocks if composed else residual_blocks
        run = partial(self._around_attention, module, self._blocks_of(linears, norms), parts, kwargs)
        # The class's own forward would see to that.
        return module._gradient_checkpointing_func(run, h) if again else run(h)

    def _around_attention(
        self, module: Any, blocks: tuple[AttentionBlock, MlpBlock], parts: Any, kwargs: dict[str, Any], h: Tensor
    ) -> Tensor:
        """The result out of `parts`, the module that has what stands before attention and behind it on this device."""
        first, second = blocks
        rotation = _contiguous(kwargs["position_embeddings"]) if self.rotates else None
        h, q, k, v = parts.before_attention(h, first, rotation)
        # The class's forward finds all of it done but to attend.
        projected = ProjectedAttention(module.self_attn, q, k, v, q_norm=_same, k_norm=_same, o_proj=_same)
        attended = self.attend(projected, hidden_states=h, **kwargs)[0]
        return parts.after_attention(h, attended, first.output, second)

    def _blocks_of(self, linears: list[nn.Module], norms: Norms) -> tuple[AttentionBlock, MlpBlock]:
        members = list(map(member_of, linears))

        def make() -> tuple[AttentionBlock, MlpBlock]:
            q, k, v, output, gate, up, down = members
            first = AttentionBlock(norms[0], q, k, v, output, self.width, self.scale, *norms[2:])
            return first, MlpBlock(norms[1], gate, up, down, self.activation)

        return self._blocks.get(ids(*members, *norms), make)

    def _is_native(self, h: Tensor) -> bool:
        return serves(h) and native_width(self.width)

    def _norms_now(self, module: Any) -> Norms | None:
        """The layer's norms as they are now; None where one has become something else, or is trained at present."""
        outer, inner = module._modules, module._modules["self_attn"]._modules
        parts = outer["input_layernorm"], outer["post_attention_layernorm"], inner.get("q_norm"), inner.get("k_norm")
        trains, norms = torch.is_grad_enabled(), []
        for part, norm in zip(parts, self.norms, strict=True):
            if norm is not None and part._parameters.get("weight") is not norm.weight:
                norm = norm_of(part)
                if norm is None:
                    return None
            if norm is not None and trains and norm.weight.requires_grad:
                return None
            norms.append(norm)
        return norms[0], norms[1], norms[2], norms[3]

    def _attention_inputs(
        self, module: Any, h: Tensor, kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None] | None:
        """Rotation and first keys of a call, if it is one of the blocks' kind."""
        mask, rotation = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        attends = module._modules["self_attn"]
        starts = None if mask is None else attention.first_keys(mask)
        plain = (
            kwargs.get("past_key_values") is None
            and not kwargs.get("use_cache")
            and (mask is None or (starts is not None and starts.shape[:2] == h.shape[:2]))
            and attends.config._attn_implementation == attention.NAME
            and not (module.training and getattr(attends, "attention_dropout", 0.0))
            and not _is_watched(module)
        )
        if not plain or (self.rotates and rotation is None):
            return None
        return (_contiguous(rotation) if self.rotates else None), starts


def linears_of(layer: Any) -> list[nn.Module]:
    """The layer's linear layers: of q, k, v, attention's output, gate, up and down."""
    attends, mlp = (layer._modules[name]._modules for name in ("self_attn", "mlp"))  # quicker than as attributes
    return [attends[name] for name in PROJECTIONS] + [mlp[name] for name in GATED]


def _is_watched(module: Any) -> bool:
    """Whether a part has hooks, which must be called."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module._modules.values())


def _contiguous(rotation: Any) -> tuple[Tensor, Tensor]:
    cos, sin = rotation
    return cos.contiguous(), sin.contiguous()


def _same(x: Tensor) -> Tensor:
    return x
