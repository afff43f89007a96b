"""The weights of a mixture's experts, each a linear layer of its own, quantized one by one and held side by side."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from entrenar.layers.adapted_linear import AdaptedLinear
from entrenar.layers.quantized_linear import linear_weight
from entrenar.native.cached import Cached
from entrenar.ops.linear.weight import DenseWeight, LinearWeight
from entrenar.quant.tensor import QuantizedTensor


class ExpertStack(nn.Module):
    """E linear layers' weights of one shape (d_out, d_in), quantized or not, as one frozen Parameter a part.

    Args:
        weights: of the experts, in order.
    """

    def __init__(self, weights: Sequence[Tensor] | Sequence[QuantizedTensor]) -> None:
        super().__init__()
        first = weights[0]
        self.count, self.d_out, self.d_in = len(weights), *first.shape
        self._first = first if isinstance(first, QuantizedTensor) else None
        parts = [weight.parts if isinstance(weight, QuantizedTensor) else {"": weight} for weight in weights]
        for name in parts[0]:
            stacked = torch.stack([part[name] for part in parts])
            self.register_parameter(f"weight_{name}".rstrip("_"), nn.Parameter(stacked, requires_grad=False))
        if self._first is not None:
            self._first = replace(self._first, parts=dict.fromkeys(self._first.parts, torch.empty(0)))
        self._weights = Cached[list[LinearWeight]]()

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are in a block format."""
        return self._first is not None

    def quantized(self, expert: int) -> QuantizedTensor:
        """One expert's weight as it is held; views of the layer's parameters."""
        assert self._first is not None
        parts = {name: self.get_parameter(f"weight_{name}").data[expert] for name in self._first.parts}
        return replace(self._first, parts=parts)

    def to_f32(self, expert: int) -> Tensor:
        """One expert's weight, (d_out, d_in) float32."""
        return (
            self.quantized(expert).dequantize() if self.is_quantized else self.get_parameter("weight")[expert].float()
        )

    def linear_weights(self) -> list[LinearWeight]:
        """Of every expert, as the linear operations take them."""
        return self._weights.get([part.data_ptr() for part in self.parameters()], self._make_weights)

    def _make_weights(self) -> list[LinearWeight]:
        if self.is_quantized:
            return [linear_weight(self.quantized(expert)) for expert in range(self.count)]
        return [DenseWeight(weight) for weight in self.get_parameter("weight").unbind(0)]


class ExpertProjection(nn.Module):
    """What transformers keeps as one 3-D parameter: one stack, or two (gate and up) that share their input.

    Args:
        stacks: their outputs stand one after the other in that parameter's rows.
    """

    def __init__(self, *stacks: ExpertStack) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)
        self.count, self.d_in = stacks[0].count, stacks[0].d_in
        self.d_out = sum(stack.d_out for stack in stacks)

    def members(self) -> list[tuple[AdaptedLinear, ...]]:
        """For every expert its layers, as layers/adapted_linear.py takes them."""
        weights = [stack.linear_weights() for stack in self.each()]
        return [tuple(map(AdaptedLinear, group)) for group in zip(*weights, strict=True)]

    def each(self) -> list[ExpertStack]:
        """The stacks."""
        return [stack for stack in self.stacks if isinstance(stack, ExpertStack)]

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return f"experts={self.count}, d_in={self.d_in}, d_out={self.d_out}"
