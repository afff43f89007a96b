"""How much each column of a weight counts: the mean square of what it is multiplied by (llama.cpp's imatrix).

The expected squared error of a layer's output, E‖(W − Ŵ)·x‖², is a sum over columns j of ‖w_j − ŵ_j‖² · E[x_j²] where
the inputs are uncorrelated; quantizers weight their errors by it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.token_rows import TokenRows

# A column that the text never excited still counts: another text may.
_LEAST = 1e-4


@torch.no_grad()
def column_importance(model: PreTrainedModel, rows: Iterable[Tensor]) -> dict[str, Tensor]:
    """Run `model` over rows of token ids (T,).

    Returns:
        For the weight of every linear layer that ran, by its transformers name: (columns,) float32 on the CPU, mean 1.
    """
    sums: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(_adder(sums, f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear | AdapterLayer | TokenRows)
    ]
    try:
        for row in rows:
            model(input_ids=row[None].to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _mean_of_one(total).cpu() for name, total in sums.items()}


def _adder(sums: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not args[0].is_floating_point():  # an adapted embedding, which has no columns to weight
            return
        squares = args[0].double().square().flatten(0, -2).sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares

    return add


def _mean_of_one(sums: Tensor) -> Tensor:
    mean = sums.mean()
    return (sums / mean).clamp(min=_LEAST).float() if mean > 0 else torch.ones_like(sums, dtype=torch.float32)
