"""ExpertLoRALayer: low-rank adapters over the experts of a mixture, one pair of factors for each.

They are peft's `target_parameters` over a 3-D parameter: A (experts · rank, d_in), expert by expert, and B (d_out,
rank · experts), the experts innermost.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.files.lora_options import LayerSpec
from entrenar.layers.adapted_linear import AdaptedLinear
from entrenar.layers.quantized_experts import ExpertProjection
from entrenar.lora.low_rank import AdapterLayer, draw
from entrenar.quant.tensor import QuantizedTensor


class ExpertLoRALayer(AdapterLayer):
    """Every expert's W_e + scale·B_e·A_e; `d_in` and `d_out` are one expert's.

    Raises:
        InputError: a rank below 1, or dropout, which is drawn for a layer's input and not for an expert's
            part of it.
    """

    def __init__(self, base: ExpertProjection, spec: LayerSpec) -> None:
        super().__init__()
        if spec.rank < 1:
            raise InputError(f"rank {spec.rank} is none for experts: choose 1 or more")
        if spec.dropout:
            raise InputError("experts take no dropout: set it to 0, or leave them out of the targets")
        self.base, self.count, self.d_in, self.d_out = base, base.count, base.d_in, base.d_out
        self.rank, self.alpha, self.scale = spec.rank, spec.alpha, spec.scale
        self.rslora, self.dropout = spec.rslora, 0.0
        device = next(base.parameters()).device
        self.lora_a = nn.Parameter(torch.empty(self.count * self.rank, self.d_in, dtype=torch.float32, device=device))
        self.lora_b = nn.Parameter(torch.zeros(self.d_out, self.rank * self.count, dtype=torch.float32, device=device))
        draw(self.lora_a, partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))

    @property
    def base_weight_quantized(self) -> QuantizedTensor | None:
        """The first expert's packed weight, which says how all are held; None for floats."""
        first = self.base.each()[0]
        return first.quantized(0) if first.is_quantized else None

    def members(self) -> list[tuple[AdaptedLinear, ...]]:
        """For every expert its layers with their factors; the two of one projection share A."""
        a, b = expert_factors(self.lora_a, self.lora_b, self.count)
        parts = b.split([stack.d_out for stack in self.base.each()], dim=1)
        halves = [part.unbind(0) for part in parts]
        return [
            tuple(
                AdaptedLinear(one.weight, None, first, half[e], self.scale)
                for one, half in zip(plain, halves, strict=True)
            )
            for e, (plain, first) in enumerate(zip(self.base.members(), a.unbind(0), strict=True))
        ]

    def base_bias(self) -> Tensor | None:
        """Experts have none."""
        return None

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"experts={self.count}, d_in={self.d_in}, d_out={self.d_out}, rank={self.rank}, scale={self.scale:g}"


def expert_factors(a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A (experts · rank, d_in), B (d_out, rank · experts) → (experts, rank, d_in), (experts, d_out, rank)."""
    return a.view(count, -1, a.shape[1]), b.view(len(b), -1, count).permute(2, 0, 1).contiguous()
