"""LoRALayer: a low-rank adapter over a frozen float weight."""

from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.layers.adapted_linear import AdaptedLinear
from entrenar.lora.linear_adapter import LinearAdapter
from entrenar.lora.low_rank import init_factors, outside
from entrenar.ops.linear.weight import DenseWeight


class LoRALayer(LinearAdapter):
    """y = x·W₀ᵀ + bias + scale·B(A(x)), scale = alpha / rank; W₀ (d_out, d_in) is frozen, A and B are trained.

    Args:
        base_weight: (d_out, d_in), any float dtype; held as it is, not copied.
        rank: 1 or more; above min(d_out, d_in) it is more than is needed.
        alpha: numerator of the scale. dropout: on the adapter's input, while training.
        bias: (d_out,), frozen. rslora: scale = alpha / √rank.

    Raises:
        InputError: base not 2-D, or rank or dropout out of range; the numbers are named.
    """

    def __init__(
        self,
        base_weight: Tensor,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        bias: Tensor | None = None,
        *,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if not base_weight.is_floating_point():
            raise InputError(f"the base weight is {base_weight.dtype}: LoRA takes a float one (QLoRALayer quantizes)")
        init_factors(self, tuple(base_weight.shape), base_weight.device, rank, alpha, dropout, rslora)
        self.base_weight = nn.Parameter(base_weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._unmerged: Tensor | None = None

    @property
    def is_merged(self) -> bool:
        """Whether scale·B·A is at present added into `base_weight`."""
        return self._unmerged is not None

    @property
    def weight(self) -> Tensor:
        """The weight for code outside the layer, see `outside`."""
        return outside(self, self.base_weight.dtype, self.base_weight.device)

    def member(self) -> AdaptedLinear:
        """The layer, dropout aside, as layers/adapted_linear.py takes it."""
        weight = DenseWeight(self.base_weight)
        if self.is_merged:
            return AdaptedLinear(weight, self.bias)
        return AdaptedLinear(weight, self.bias, self.lora_a, self.lora_b, self.scale)

    def merge(self) -> None:
        """Add scale·B·A into `base_weight`; the weight before is kept: `unmerge` is exact. Twice is an error."""
        if self.is_merged:
            raise InputError("this layer is merged already: call unmerge() first")
        merged = self.merge_to_f32().to(self.base_weight.dtype)
        self._unmerged, self.base_weight.data = self.base_weight.data, merged

    def unmerge(self) -> None:
        """Put `base_weight` back to the last bit."""
        if self._unmerged is None:
            raise InputError("this layer is not merged: there is nothing to undo")
        self.base_weight.data, self._unmerged = self._unmerged, None

    def base_bias(self) -> Tensor | None:
        """The bias (d_out,)."""
        return self.bias

    def base_to_f32(self) -> Tensor:
        """W₀, (d_out, d_in) float32, whether merged or not."""
        return (self.base_weight.data if self._unmerged is None else self._unmerged).float()

    def rounded(self, weight: Tensor) -> Tensor:
        """What holding a weight (d_out, d_in) float32 as this base does to it."""
        return weight.to(self.base_weight.dtype).float()

    def set_base(self, weight: Tensor) -> None:
        """Hold another weight (d_out, d_in) as the base is held; a Parameter of its own, not the one given before."""
        self.base_weight = nn.Parameter(weight.to(self.base_weight), requires_grad=False)

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's weight."""
        return self.base_weight.numel() * self.base_weight.element_size()
