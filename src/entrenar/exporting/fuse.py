"""The fused tensors of a live model: base + scale·B·A where there is an adapter, dequantized where there is none.

For a 16-bit result the dequantized base + Δ is the model that was trained, so that is what is written. Without an
adapter no model is needed: the tensors come straight from its files, one at a time.
"""

from collections.abc import Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from entrenar.files.lazy_tensor import LazyTensor, Packed
from entrenar.files.stored_tensor import StoredTensor
from entrenar.lora.low_rank import AdapterLayer
from entrenar.models.load import build_on_meta, linear_weights
from entrenar.models.match import match_tensors
from entrenar.models.source import ModelSource
from entrenar.quant.embedding import QuantizedEmbedding
from entrenar.quant.linear import QuantizedLinear
from entrenar.quant.registry import KEPT_FORMATS
from entrenar.quant.tensor import QuantizedTensor, quantize


def fused_tensors(model: nn.Module) -> list[LazyTensor]:
    """Every parameter under its transformers name, each made when it is written; a tied tensor comes once."""
    return list(_walk(model, "", set()))


def source_tensors(source: ModelSource, format: str | None) -> list[LazyTensor]:
    """The same for a model that is not loaded and has no adapter, in the order of its files.

    Args:
        format: what its linear layers would be quantized to if it were loaded; None: they are as they are.

    Raises:
        InputError: the files do not hold the architecture's tensors.
    """
    model = build_on_meta(source, torch.float32)
    tensors = match_tensors(model, source)
    linear = linear_weights(model, model.get_output_embeddings()) if format else set()

    def lazy(name: str) -> LazyTensor:
        stored = tensors[name]
        if format and name in linear:
            return LazyTensor(name, stored.shape, partial(_rounded, stored, format))
        packed = None
        if source.blocks and len(stored.shape) == 2:
            packed = Packed(source.blocks.type_of(name), source.blocks.packed(name).read)
        return LazyTensor(name, stored.shape, stored.read, packed)

    return [lazy(name) for name in tensors]


def _rounded(stored: StoredTensor, format: str) -> Tensor:
    return quantize(stored.read(), format=format).dequantize()


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[LazyTensor]:
    fused = _fused_weight(f"{prefix}weight", module)
    if fused is not None:
        parts = {id(part) for part in module.parameters() if part.dtype == torch.uint8}
        if parts and parts <= seen:  # a head over the embedding's storage
            return
        seen |= parts
        yield fused
        bias = getattr(getattr(module, "base", module), "bias", None)
        if bias is not None:
            yield _plain(f"{prefix}bias", cast(Tensor, bias))
        return
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield _plain(f"{prefix}{name}", parameter)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", seen)


def _fused_weight(name: str, module: nn.Module) -> LazyTensor | None:
    """The weight of an adapted or quantized layer; None for any other module."""
    if isinstance(module, AdapterLayer):
        return LazyTensor(name, (module.d_out, module.d_in), module.merge_to_f32)
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        weight = module.quantized_weight
        return LazyTensor(name, weight.shape, module.fused_weight, _packed(weight))
    return None


def _packed(weight: QuantizedTensor) -> Packed | None:
    return Packed(weight.format, lambda: weight.parts["codes"]) if weight.format in KEPT_FORMATS else None


def _plain(name: str, parameter: Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(parameter.shape), lambda: parameter.detach())
