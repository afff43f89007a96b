"""EmbeddingLoRALayer: a low-rank adapter over an embedding (LoRA, Hu et al. 2021; A zero and B normal, as in peft)."""

import torch.nn.functional as F
from torch import Tensor, nn

from entrenar.files.peft_tensors import EMBEDDING_ENDS
from entrenar.lora.low_rank import AdapterLayer, draw, init_factors


class EmbeddingLoRALayer(AdapterLayer):
    """embedding(ids) + scale·B·A[:, ids], times what the embedding itself multiplies by (Gemma).

    A (rank, d_in), B (d_out, rank): d_in is the vocabulary, d_out the width, and the base's weight (d_in, d_out).
    """

    is_transposed = True

    def __init__(self, base: nn.Embedding, rank: int, alpha: float, *, rslora: bool = False) -> None:
        super().__init__()
        vocabulary, width = base.weight.shape
        init_factors(self, (width, vocabulary), base.weight.device, rank, alpha, 0.0, rslora)
        nn.init.zeros_(self.lora_a)
        draw(self.lora_b, nn.init.normal_)
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The base's weight: what transformers asks of an embedding."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (...,) int64 → (..., d_out), in the base's dtype."""
        base = self.base(ids)
        added = F.linear(F.embedding(ids, self.lora_a.t()), self.lora_b) * self.scale
        stretch = getattr(self.base, "embed_scale", None)
        added = added if stretch is None else added * stretch
        return base + added.to(base.dtype)

    def file_tensors(self) -> dict[str, nn.Parameter]:
        """A and B."""
        return dict(zip(EMBEDDING_ENDS, (self.lora_a, self.lora_b), strict=True))

    def base_bias(self) -> Tensor | None:
        """An embedding has none."""
        return None

    def base_to_f32(self) -> Tensor:
        """The base's weight as (d_out, d_in) float32."""
        return self.base.weight.detach().float().t()
