"""What LoRALayer and QLoRALayer share: a low-rank adapter over one linear layer, however its weight is held."""

from torch import Tensor, nn

from entrenar.lora.low_rank import AdapterLayer, MemoryStats, adapted_forward, memory_stats


class LinearAdapter(AdapterLayer):
    """y = x·Wᵀ + bias + scale·B(A(x)); W (d_out, d_in) is frozen, A and B are trained."""

    def forward(self, x: Tensor) -> Tensor:
        """X (..., d_in) → (..., d_out), computed in the dtype of x; a merged layer runs its base alone."""
        return adapted_forward(self, x)

    @property
    def weight(self) -> Tensor:
        """The weight for code outside the layer, see `outside` in lora/low_rank.py."""
        raise NotImplementedError

    @property
    def runs_alone(self) -> bool:
        """While dropout is at work or the bias is trained."""
        bias = self.base_bias()
        return self.is_dropping or (bias is not None and bias.requires_grad)

    def trainable_params(self) -> list[nn.Parameter]:
        """[A, B]."""
        return [self.lora_a, self.lora_b]

    def rounded(self, weight: Tensor) -> Tensor:
        """What holding a weight (d_out, d_in) float32 as this base does to it."""
        raise NotImplementedError

    def set_base(self, weight: Tensor) -> None:
        """Hold another weight (d_out, d_in), from any device, as the base is held."""
        raise NotImplementedError

    @property
    def base_bytes(self) -> int:
        """Bytes of the base's weight."""
        raise NotImplementedError

    def memory_stats(self) -> MemoryStats:
        """Bytes of base and adapter."""
        return memory_stats(self, self.base_bytes)
