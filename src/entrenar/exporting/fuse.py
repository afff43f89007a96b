"""The fused tensors of a live model: base + scale·B·A where there is an adapter, dequantized where there is none.

For a 16-bit result the dequantized base + Δ is the model that was trained, so that is what is written.
"""

from collections.abc import Iterator
from functools import partial
from typing import cast

from torch import Tensor, nn

from entrenar.files.lazy_tensor import LazyTensor
from entrenar.lora.low_rank import is_adapter


def fused_tensors(model: nn.Module) -> list[LazyTensor]:
    """Every parameter under its transformers name, each made when it is written; a tied tensor comes once."""
    return list(_walk(model, "", set()))


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[LazyTensor]:
    make = _fused_weight(module)
    if make is not None:
        yield LazyTensor(f"{prefix}weight", _weight_shape(module), make)
        bias = getattr(module, "base", module).bias
        if bias is not None:
            yield _plain(f"{prefix}bias", cast(Tensor, bias))
        return
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield _plain(f"{prefix}{name}", parameter)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", seen)


def _fused_weight(module: nn.Module) -> partial[Tensor] | None:
    """How to make the weight of an adapted or quantized layer; None for any other module."""
    for method in ("merge_to_f32", "fused_weight"):
        if hasattr(module, method):
            return partial(getattr(module, method))
    return None


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if is_adapter(module):
        return (module.d_out, module.d_in)  # pyright: ignore[reportReturnType]
    return (module.out_features, module.in_features)  # pyright: ignore[reportReturnType]


def _plain(name: str, parameter: Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(parameter.shape), lambda: parameter.detach())
