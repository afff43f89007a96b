"""The fused tensors of a live model: base + scale·B·A where there is an adapter, dequantized where there is none.

For a 16-bit result the dequantized base + Δ is the model that was trained, so that is what is written.
"""

from collections.abc import Callable, Iterator
from typing import cast

from torch import Tensor, nn

from entrenar.files.lazy_tensor import LazyTensor
from entrenar.lora.low_rank import AdapterLayer
from entrenar.quant.linear import QuantizedLinear


def fused_tensors(model: nn.Module) -> list[LazyTensor]:
    """Every parameter under its transformers name, each made when it is written; a tied tensor comes once."""
    return list(_walk(model, "", set()))


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[LazyTensor]:
    fused = _fused_weight(module)
    if fused is not None:
        yield LazyTensor(f"{prefix}weight", *fused)
        bias = module.base_bias() if isinstance(module, AdapterLayer) else module.bias
        if bias is not None:
            yield _plain(f"{prefix}bias", cast(Tensor, bias))
        return
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield _plain(f"{prefix}{name}", parameter)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", seen)


def _fused_weight(module: nn.Module) -> tuple[tuple[int, ...], Callable[[], Tensor]] | None:
    """Shape and maker of the weight of an adapted or quantized layer; None for any other module."""
    if isinstance(module, AdapterLayer):
        if module.is_transposed:
            return (module.d_in, module.d_out), lambda: module.merge_to_f32().t()
        return (module.d_out, module.d_in), module.merge_to_f32
    if isinstance(module, QuantizedLinear):
        return (module.out_features, module.in_features), module.fused_weight
    return None


def _plain(name: str, parameter: Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(parameter.shape), lambda: parameter.detach())
