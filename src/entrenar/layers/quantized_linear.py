"""QuantizedLinear: a frozen linear layer that keeps its weight in a block format.

On a CPU the weight is decoded a panel at a time while it is multiplied (ops/linear/weight.py). On a GPU it is
dequantized whole, multiplied and dropped, and once more in the backward for x: such a layer costs its packed bytes
plus, while it runs, one weight in the compute dtype (QLoRA, Dettmers et al. 2023, equation 5).
"""

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.layers.adapted_linear import AdaptedLinear, adapted_linears
from entrenar.layers.weight_stand_in import weight_stand_in
from entrenar.native.cached import Cached, ids
from entrenar.ops.linear.weight import DenseWeight, LinearWeight
from entrenar.quant.registry import held_format
from entrenar.quant.tensor import QuantizedTensor


class QuantizedLinear(nn.Module):
    """y = x·Wᵀ + bias with W (d_out, d_in) quantized and frozen.

    The parts of the weight are frozen uint8 Parameters named `weight_<part>`, so that state_dict, deepcopy, DDP and
    FSDP2 treat them as any other parameter. The compute dtype is that of x.
    """

    runs_alone = False  # it has nothing but its member to compute

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None) -> None:
        """Take over a quantized weight (d_out, d_in) and an optional bias (d_out,).

        A part that is a Parameter already is shared with whoever has it: a tied output head's.
        """
        super().__init__()
        if len(weight.shape) != 2:
            raise InputError(f"a linear layer's weight has 2 dimensions, this one has shape {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self._layout = (weight.format, weight.shape, weight.dtype, weight.block_size)
        self._part_names, self._searched = tuple(weight.parts), weight.searched
        for name, part in weight.parts.items():
            parameter = part if isinstance(part, nn.Parameter) else nn.Parameter(part, requires_grad=False)
            self.register_parameter(f"weight_{name}", parameter)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._weight = Cached[LinearWeight]()
        self._member = Cached[AdaptedLinear]()

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight as it is held; its parts are the layer's own parameters."""
        parts = {name: self.get_parameter(f"weight_{name}").data for name in self._part_names}
        return QuantizedTensor(*self._layout, parts, self._searched)

    @property
    def weight(self) -> Tensor:
        """The weight for code outside the layer, dequantized whenever something computes with it."""
        packed = self.quantized_weight
        return weight_stand_in(packed.shape, packed.dtype, packed.device, self.dequantized)

    def forward(self, x: Tensor) -> Tensor:
        """X (..., d_in) → (..., d_out)."""
        return linear(x, self.member())

    def member(self) -> AdaptedLinear:
        """The layer as layers/adapted_linear.py takes it."""
        weight, bias = self.linear_weight(), self.bias
        return self._member.get(ids(weight, bias), lambda: AdaptedLinear(weight, bias))

    def linear_weight(self) -> LinearWeight:
        """The weight as the linear operations take it."""
        places = [part.data_ptr() for name, part in self._parameters.items() if part is not None and name != "bias"]
        return self._weight.get(places, lambda: linear_weight(self.quantized_weight))

    def dequantized(self) -> Tensor:
        """The dequantized weight, (d_out, d_in) float32."""
        return self.quantized_weight.dequantize()

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        weight = self.quantized_weight
        kind = f"{weight.format}, block_size={weight.block_size}, double_quant={weight.is_double_quantized}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}, bias={self.bias is not None}"


def grouped_linears(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Each layer's output for one input x (..., d_in): one operation where all of them allow it, else one by one."""
    if not all(can_join(layer) for layer in layers):
        return tuple(layer(x) for layer in layers)
    return adapted_linears(in_compute_dtype(x), [member_of(layer) for layer in layers])


class _Joinable(Protocol):
    """A frozen linear layer, adapted or not, that can be computed together with others over the same input."""

    @property
    def runs_alone(self) -> bool:
        """Whether it has more than its member to compute at present."""
        ...

    def member(self) -> AdaptedLinear: ...


def can_join(layer: nn.Module) -> bool:
    """Whether a layer is frozen and has nothing but its member to compute: no dropout at work, no hook to be called."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    bias = layer._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        return False
    if type(layer) is nn.Linear:
        return not layer.weight.requires_grad
    return hasattr(layer, "member") and not cast(_Joinable, layer).runs_alone


def member_of(layer: nn.Module) -> AdaptedLinear:
    """A layer that can join others as layers/adapted_linear.py takes it."""
    if type(layer) is nn.Linear:
        return AdaptedLinear(DenseWeight(layer.weight), layer.bias)
    return cast(_Joinable, layer).member()


def quantized_linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """x (..., d_in) → (..., d_out) through a quantized weight (d_out, d_in); gradient reaches x and bias only."""
    member = _member(weight)
    return linear(x, member if bias is None else AdaptedLinear(member.weight, bias))


def linear(x: Tensor, member: AdaptedLinear) -> Tensor:
    """x (..., d_in) → (..., d_out) through one layer, in autocast's dtype where autocast is on."""
    x = in_compute_dtype(x)
    if x.shape[-1:] != member.weight.shape[1:]:
        raise InputError(f"the input has shape {tuple(x.shape)} but the layer takes (..., {member.weight.shape[1]})")
    return adapted_linears(x, [member])[0]


def in_compute_dtype(x: Tensor) -> Tensor:
    """X as it is, or in autocast's dtype where autocast is on: what a linear layer of PyTorch computes in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def linear_weight(weight: QuantizedTensor) -> LinearWeight:
    """A quantized matrix as the linear operations take it."""
    shape = (weight.shape[0], weight.shape[1])
    return held_format(weight.format).linear_weight(weight.parts, weight.block_size, shape)


def _member(weight: QuantizedTensor) -> AdaptedLinear:
    """The layer without a bias."""
    return AdaptedLinear(linear_weight(weight))
