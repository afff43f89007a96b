"""DoRALayer: the rows of an adapted weight get a trained length (DoRA, Liu et al. 2024, equation 5).

W' = m ∘ (W + scale·B·A) / ‖W + scale·B·A‖, norms over each row, the norm taken as a constant in the backward (section
4.3). It is never computed from a whole adapted weight:

    ‖W + s·B·A‖² = ‖W‖² + 2s·Σ_r B ∘ (W·Aᵀ) + s²·Σ_r (B·(A·Aᵀ)) ∘ B

where ‖W‖² is kept, and W·Aᵀ is a product with `rank` tokens, which a packed weight multiplies as it is.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entrenar.files.peft_tensors import MAGNITUDE_END
from entrenar.layers.adapted_linear import adapted_linears, low_rank
from entrenar.layers.quantized_linear import in_compute_dtype
from entrenar.lora.linear_adapter import LinearAdapter
from entrenar.lora.low_rank import AdapterLayer, check_input

_TINY = torch.finfo(torch.float32).tiny


class DoRALayer(AdapterLayer):
    """A LoRA or QLoRA layer whose rows have a trained length; `lora_magnitude` (d_out,) starts at the rows' own.

    Args:
        plain: the layer it is made over, whose factors it shares; its base is held as it is.
    """

    def __init__(self, plain: LinearAdapter) -> None:
        super().__init__()
        self.rank, self.alpha, self.dropout, self.scale = plain.rank, plain.alpha, plain.dropout, plain.scale
        self.d_in, self.d_out, self.rslora = plain.d_in, plain.d_out, plain.rslora
        self.is_transposed, self.start, self.taken = plain.is_transposed, plain.start, plain.taken
        self.lora_a, self.lora_b, self.plain = plain.lora_a, plain.lora_b, plain
        self.register_buffer("_squares", plain.base_to_f32().square().sum(1), persistent=False)
        self.lora_magnitude = nn.Parameter(self.row_norms())

    @property
    def weight(self) -> Tensor:
        """The weight for code outside the layer, see `outside` in lora/low_rank.py."""
        return self.plain.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (d_out,)."""
        return self.plain.base_bias()

    @property
    def runs_alone(self) -> bool:
        """Always: it is more than its member."""
        return True

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """‖W + scale·B·A‖ of each row, (d_out,) float32."""
        a, b = self.lora_a.detach().float(), self.lora_b.detach().float()
        crossed = self.plain.member().weight.product(a).t()
        added = 2 * (b * crossed).sum(1) + self.scale * ((b @ (a @ a.t())) * b).sum(1)
        return (self.get_buffer("_squares") + self.scale * added).clamp_(min=_TINY).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """X (..., d_in) → (..., d_out), in the dtype of x or autocast's."""
        check_input(self, x)
        x = in_compute_dtype(x)
        member = self.plain.member()
        stretch = (self.lora_magnitude / self.row_norms()).to(x.dtype)
        if not self.is_dropping:
            y = adapted_linears(x, [replace(member, bias=None)])[0] * stretch
        else:  # as in peft: what the stretch adds sees the dropped input as well
            base, dropped = replace(member, a=None, b=None, bias=None), F.dropout(x, self.dropout)
            plain, y = adapted_linears(x, [base])[0], adapted_linears(dropped, [base])[0]
            y = plain + y * (stretch - 1) + low_rank(dropped, self.lora_a, self.lora_b, self.scale) * stretch
        return y if member.bias is None else y + member.bias.to(y.dtype)

    def file_tensors(self) -> dict[str, nn.Parameter]:
        """A, B and the rows' lengths."""
        return self.plain.file_tensors() | {MAGNITUDE_END: self.lora_magnitude}

    def base_bias(self) -> Tensor | None:
        """The bias (d_out,)."""
        return self.plain.base_bias()

    def base_to_f32(self) -> Tensor:
        """The base's weight, (d_out, d_in) float32."""
        return self.plain.base_to_f32()

    def merge_to_f32(self) -> Tensor:
        """W', (d_out, d_in) float32."""
        return self.plain.merge_to_f32() * (self.lora_magnitude.detach() / self.row_norms())[:, None]
