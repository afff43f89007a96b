"""QLoRALayer: a low-rank adapter over a frozen quantized weight (QLoRA, Dettmers et al. 2023, equation 5)."""

from typing import NoReturn

from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.layers.adapted_linear import AdaptedLinear
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.linear_adapter import LinearAdapter
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.low_rank import init_factors, outside
from entrenar.native.cached import Cached, ids
from entrenar.quant.tensor import QuantizedTensor, quantize, requantize


class QLoRALayer(LinearAdapter):
    """y = x·dequantize(W)ᵀ + bias + scale·B(A(x)); W is never changed in place, and only its packed bytes are kept.

    Args:
        base_weight: (d_out, d_in) float, quantized here; or a QuantizedTensor, taken over as it is.
        rank, alpha, dropout, bias, rslora: as in LoRALayer.
        format: number format of the base: int4, nf4, fp4 or int8.
        double_quant: hold the block scales in 8 bits.

    Raises:
        InputError: base not 2-D or not finite, rank or dropout out of range, unknown format.
    """

    def __init__(
        self,
        base_weight: Tensor | QuantizedTensor,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        *,
        format: str = "nf4",
        double_quant: bool = False,
        block_size: int = 64,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        init_factors(self, tuple(base_weight.shape), base_weight.device, rank, alpha, dropout, rslora)
        if isinstance(base_weight, Tensor):
            base_weight = quantize(base_weight, format=format, block_size=block_size, double_quant=double_quant)
        self.base = QuantizedLinear(base_weight, bias)
        self._member = Cached[AdaptedLinear]()

    @classmethod
    def from_lora(cls, layer: LoRALayer, format: str = "nf4", double_quant: bool = False) -> "QLoRALayer":
        """Quantize the base of a LoRALayer and take over copies of its factors; a merged layer's original base."""
        if layer.is_merged:
            raise InputError("this LoRALayer is merged: call unmerge() first, so that its adapter is not counted twice")
        new = cls(
            layer.base_weight, layer.rank, layer.alpha, layer.dropout, layer.bias,
            format=format, double_quant=double_quant, rslora=layer.rslora,
        )  # fmt: skip
        new.lora_a.data.copy_(layer.lora_a.data)
        new.lora_b.data.copy_(layer.lora_b.data)
        return new

    @property
    def base_weight_quantized(self) -> QuantizedTensor:
        """The packed base."""
        return self.base.quantized_weight

    @property
    def is_double_quantized(self) -> bool:
        """Whether the block scales are held in 8 bits."""
        return self.base_weight_quantized.is_double_quantized

    @property
    def is_merged(self) -> bool:
        """Always False: a quantized base is never changed in place."""
        return False

    @property
    def weight(self) -> Tensor:
        """The weight for code outside the layer, see `outside`."""
        return outside(self, self.base_weight_quantized.dtype, self.base_weight_quantized.device)

    @property
    def bias(self) -> Tensor | None:
        """The bias (d_out,)."""
        return self.base.bias

    def member(self) -> AdaptedLinear:
        """The layer, dropout aside, as layers/adapted_linear.py takes it."""
        base, factors = self.base, self._parameters
        weight, bias, a, b = base.linear_weight(), base._parameters.get("bias"), factors["lora_a"], factors["lora_b"]
        scale = self.scale
        return self._member.get((*ids(weight, bias, a, b), scale), lambda: AdaptedLinear(weight, bias, a, b, scale))

    def merge(self) -> NoReturn:
        """Not possible in place; the error names `merge_to_f32`."""
        raise InputError(
            "a quantized base is never changed in place: merge_to_f32() gives the merged weight in float32"
        )

    def base_bias(self) -> Tensor | None:
        """The bias (d_out,)."""
        return self.base.bias

    def base_to_f32(self) -> Tensor:
        """dequantize(W), (d_out, d_in) float32."""
        return self.base.dequantized()

    def rounded(self, weight: Tensor) -> Tensor:
        """What holding a weight (d_out, d_in) float32 as this base does to it."""
        return requantize(weight, self.base_weight_quantized).dequantize()

    def set_base(self, weight: Tensor) -> None:
        """Hold another weight (d_out, d_in), from any device, in the base's format."""
        stored = self.base_weight_quantized
        self.base = QuantizedLinear(requantize(weight, stored).to(stored.device), self.base.bias)

    @property
    def base_bytes(self) -> int:
        """Bytes of the packed base."""
        return self.base_weight_quantized.memory_bytes
