"""The faster forwards of norms, gated MLPs and output heads; a module's forward also says what it was recognised as."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from entrenar.layers.quantized_linear import grouped_linears
from entrenar.layers.recompute import with_recipe
from entrenar.layers.residual_blocks import Norm
from entrenar.models.acceleration.swapped import FastForward, fast_forward_of
from entrenar.ops.elementwise.gated_activation import gated_activation
from entrenar.ops.elementwise.rms_norm import rms_norm


@dataclass(frozen=True)
class NormForward(FastForward):
    """An RMS norm's forward."""

    eps: float
    offset: float

    def __call__(self, module: Any, /, hidden_states: Tensor) -> Tensor:
        """(..., C) → (..., C)."""
        make = partial(_norm, eps=self.eps, offset=self.offset)
        return with_recipe(make(hidden_states, module.weight), make, hidden_states, module.weight)


def _norm(x: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
    return rms_norm(x, weight, eps, offset)


@dataclass(frozen=True)
class GatedMlpForward(FastForward):
    """A gated MLP's forward."""

    kind: str

    def __call__(self, module: Any, /, x: Tensor) -> Tensor:
        """(..., C) → (..., C)."""
        gate, up = grouped_linears(x, (module.gate_proj, module.up_proj))
        make = partial(gated_activation, kind=self.kind)
        return module.down_proj(with_recipe(make(gate, up), make, gate, up))


class HeadForward(FastForward):
    """An output head's forward, over rows that lie together.

    `generate` asks for the logits of each prompt's last token, a slice whose strides send PyTorch's bfloat16 product to
    a loop of single numbers (torch 2.13 on a CPU): 2.7 s in place of 6 ms for 32 prompts and SmolLM2's vocabulary.
    """

    def __call__(self, module: Any, /, hidden_states: Tensor) -> Tensor:
        """(..., C) → (..., V)."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        return type(module).forward(module, rows).view(*hidden_states.shape[:-1], module.out_features)


def norm_of(module: nn.Module) -> Norm | None:
    """The RMS norm a module was recognised as."""
    forward = fast_forward_of(module)
    return (
        Norm(module.get_parameter("weight"), forward.eps, forward.offset) if isinstance(forward, NormForward) else None
    )


def activation_of(module: nn.Module) -> str | None:
    """The kind of a gated MLP's activation, if the module was recognised as one."""
    forward = fast_forward_of(module)
    return forward.kind if isinstance(forward, GatedMlpForward) else None
