"""The low-rank factors that the adapter layers share (LoRA, Hu et al. 2021, section 4.1).

Δ = scale · B·A with A (rank, d_in), B (d_out, rank), scale = alpha / rank (rsLoRA, Kalajdzievski 2023: alpha / √rank).
A starts Kaiming-uniform with a = √5 (as in peft), B at zero, so that a fresh adapter changes nothing. Both are float32
whatever the base is; they are used in the dtype of x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.files.lora_options import LayerSpec
from entrenar.files.peft_tensors import A_END, B_END
from entrenar.layers.adapted_linear import AdaptedLinear, adapted_linears, low_rank
from entrenar.layers.quantized_linear import in_compute_dtype
from entrenar.layers.weight_stand_in import weight_stand_in


@dataclass(frozen=True, kw_only=True)
class MemoryStats:
    """Bytes of an adapted layer; `base_unquantized_bytes` counts the base as float32.

    `compression_ratio` is base_unquantized_bytes / base_quantized_bytes.
    """

    base_unquantized_bytes: int
    base_quantized_bytes: int
    lora_bytes: int
    total_bytes: int
    compression_ratio: float


class AdapterLayer(nn.Module):
    """The interface of an adapted layer: what attach, save, fuse and export ask of it. Subclasses say how they compute.

    `is_transposed`: the module it stands for keeps its weight as (d_in, d_out), as GPT-2's Conv1D does.
    """

    rank: int
    alpha: float
    dropout: float
    scale: float
    rslora: bool
    d_in: int
    d_out: int
    is_transposed = False
    # An initialisation that changed the base (lora/initial.py), and what it took: A₀ (rank, d_in), B₀ (d_out, rank).
    start: str = "default"
    taken: tuple[Tensor, Tensor] | None = None
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    @property
    def in_features(self) -> int:
        """d_in under the name that nn.Linear has for it."""
        return self.d_in

    @property
    def out_features(self) -> int:
        """d_out under the name that nn.Linear has for it."""
        return self.d_out

    @property
    def is_dropping(self) -> bool:
        """Whether dropout is at work, so that the adapter's input is not the base's."""
        return bool(self.dropout) and self.training

    @property
    def runs_alone(self) -> bool:
        """Whether the layer computes more than its `member` at present: dropout, a trained bias, a variant."""
        return self.is_dropping

    def member(self) -> AdaptedLinear:
        """The layer, dropout aside, as layers/adapted_linear.py takes it."""
        raise NotImplementedError

    def base_bias(self) -> Tensor | None:
        """The bias (d_out,) of the module it stands for."""
        raise NotImplementedError

    def file_tensors(self) -> dict[str, nn.Parameter]:
        """What is saved of the layer, under the ends of PEFT's keys."""
        return {A_END: self.lora_a, B_END: self.lora_b}

    def base_to_f32(self) -> Tensor:
        """The base's weight, (d_out, d_in) float32."""
        raise NotImplementedError

    def merge_to_f32(self) -> Tensor:
        """Base + scale·B·A, (d_out, d_in) float32, whether a layer is merged or not."""
        return self.base_to_f32() + delta(self)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"d_in={self.d_in}, d_out={self.d_out}, rank={self.rank}, scale={self.scale:g}"


def init_factors(
    layer: AdapterLayer,
    shape: tuple[int, ...],
    device: torch.device,
    rank: int,
    alpha: float,
    dropout: float,
    rslora: bool = False,
) -> None:
    """Give `layer` its fresh factors over a base of `shape` (d_out, d_in).

    Raises:
        InputError: the base is not 2-D, rank < 1, or dropout outside [0, 1).
    """
    if len(shape) != 2:
        raise InputError(
            f"LoRA needs a base weight with 2 dimensions (d_out, d_in); this one has {len(shape)}: {shape}"
        )
    if rank < 1:  # above the smaller side it is more than is needed, and as peft has it (a gate of one row)
        raise InputError(f"rank {rank} is none for a base of shape {shape}: choose 1 or more")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout {dropout} is not a probability: choose 0 or more, below 1")
    layer.d_out, layer.d_in = shape
    layer.rank, layer.alpha, layer.dropout, layer.rslora = rank, float(alpha), dropout, rslora
    layer.scale = LayerSpec(rank=rank, alpha=alpha, rslora=rslora).scale
    layer.lora_a = nn.Parameter(torch.empty(rank, layer.d_in, dtype=torch.float32, device=device))
    layer.lora_b = nn.Parameter(torch.zeros(layer.d_out, rank, dtype=torch.float32, device=device))
    draw(layer.lora_a, partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))


def outside(layer: AdapterLayer, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An adapted layer's weight for code outside the layer: shape, dtype and device; computing with it is refused."""

    def refuse() -> NoReturn:
        raise InputError(
            f"this architecture computes with the weight of a layer ({layer.d_out} × {layer.d_in}) outside the layer, "
            "where its adapter is not seen: leave such layers out (lora: exclude)"
        )

    return weight_stand_in((layer.d_out, layer.d_in), dtype, device, refuse)


@torch.no_grad()
def draw(factor: Tensor, fill: Callable[[Tensor], object]) -> None:
    """Fill a factor with random numbers of the CPU's generator: one seed makes one adapter on any device."""
    drawn = torch.empty(factor.shape)
    fill(drawn)
    factor.copy_(drawn)


def check_input(layer: AdapterLayer, x: Tensor) -> None:
    """InputError unless the last dimension of x is the layer's d_in."""
    if x.dim() == 0:
        raise InputError(f"the input has 0 dimensions but the layer takes (..., {layer.d_in})")
    if x.shape[-1] != layer.d_in:
        raise InputError(f"the input's last dimension is {x.shape[-1]} but the layer takes {layer.d_in}")


def adapted_forward(layer: AdapterLayer, x: Tensor) -> Tensor:
    """base(x) + scale·B(A(dropout(x))): x (..., d_in) → (..., d_out), in the dtype of x or autocast's."""
    check_input(layer, x)
    x = in_compute_dtype(x)
    if not layer.is_dropping:
        return adapted_linears(x, [layer.member()])[0]
    base = replace(layer.member(), a=None, b=None)
    dropped = F.dropout(x, layer.dropout)
    return adapted_linears(x, [base])[0] + low_rank(dropped, layer.lora_a, layer.lora_b, layer.scale)


def delta(layer: AdapterLayer) -> Tensor:
    """scale·B·A, (d_out, d_in) float32."""
    return (layer.lora_b.detach() @ layer.lora_a.detach()).float() * layer.scale


def memory_stats(layer: AdapterLayer, base_bytes: int) -> MemoryStats:
    """The layer's MemoryStats when its base weight holds `base_bytes`."""
    lora_bytes = sum(p.numel() * p.element_size() for p in (layer.lora_a, layer.lora_b))
    unquantized = layer.d_out * layer.d_in * 4
    return MemoryStats(
        base_unquantized_bytes=unquantized,
        base_quantized_bytes=base_bytes,
        lora_bytes=lora_bytes,
        total_bytes=base_bytes + lora_bytes,
        compression_ratio=unquantized / base_bytes,
    )
