"""The fused tensors of a live model: base + scale·B·A where there is an adapter, dequantized where there is none.

For a 16-bit result the dequantized base + Δ is the model that was trained, so that is what is written. Without an
adapter no model is needed: the tensors come straight from its files, one at a time.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.exporting.streaming import StreamedModel
from entrenar.files.lazy_tensor import LazyTensor, Packed
from entrenar.files.peft import BaseFormat
from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.fusing import fused_weight
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.token_rows import TokenRows
from entrenar.models.experts import Experts
from entrenar.opening.source import ModelSource
from entrenar.quant.registry import AS_STORED_FORMATS
from entrenar.quant.tensor import QuantizedTensor


def fused_tensors(model: nn.Module) -> list[LazyTensor]:
    """Every parameter and saved buffer under its transformers name, on the CPU, each made when it is written.

    A tied one comes once.
    """
    return [_on_cpu(tensor) for tensor in _walk(model, "", set())]


def source_tensors(source: ModelSource, format: str | None) -> list[LazyTensor]:
    """The same for a model that is not loaded and has no adapter, in the order of its files.

    Args:
        format: what its linear layers would be quantized to if it were loaded; None: they are as they are.

    Raises:
        InputError: the files do not hold the architecture's tensors.
    """
    base = BaseFormat(format=format, block_size=64, double_quant=False) if format else None
    model = StreamedModel(source, None, base)

    def lazy(name: str) -> LazyTensor:
        packed = None
        if source.gguf and len(model.shape(name)) == 2 and not (format and name in model.base.linear):
            packed = Packed(source.gguf.type_of(name), source.gguf.blocks(name).read)
        return LazyTensor(name, model.shape(name), lambda: model.fused(name).weight, packed=packed)

    return [lazy(name) for name in model.names()]


def _on_cpu(tensor: LazyTensor) -> LazyTensor:
    make, packed = tensor.make, tensor.packed
    moved = packed and Packed(packed.type, lambda: packed.make().cpu())
    return replace(tensor, make=lambda: make().cpu(), packed=moved)


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[LazyTensor]:
    if isinstance(module, Experts):
        raise InputError(
            f"{prefix[:-1]} is a mixture of experts, which is exported from its files alone: save the adapter and "
            "export --to safetensors"
        )
    if isinstance(module, TokenRows) and module.is_tied:
        return
    fused = _fused_weight(f"{prefix}weight", module)
    if fused is not None:
        parts = {id(part) for part in module.parameters() if part.dtype == torch.uint8}
        if not isinstance(module, AdapterLayer):
            if parts and parts <= seen:  # a head over the embedding's storage
                return
            seen |= parts
        yield fused
        plain = module.base if isinstance(module, TokenRows) else module
        bias = module.base_bias() if isinstance(module, AdapterLayer) else getattr(plain, "bias", None)
        if bias is not None:
            yield _plain(f"{prefix}bias", cast(Tensor, bias))
        return
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield _plain(f"{prefix}{name}", parameter)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield replace(_plain(f"{prefix}{name}", buffer), dtype=buffer.dtype)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", seen)


def _fused_weight(name: str, module: nn.Module) -> LazyTensor | None:
    """The weight of an adapted or quantized layer, or of one with rows of its own; None for any other module."""
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        stored = module.quantized_weight
        return LazyTensor(name, stored.shape, lambda: fused_weight(module), packed=_packed(stored))
    if isinstance(module, AdapterLayer):
        shape = (module.d_in, module.d_out) if module.is_transposed else (module.d_out, module.d_in)
        return LazyTensor(name, shape, lambda: fused_weight(module))
    if isinstance(module, TokenRows):
        return LazyTensor(name, tuple(module.weight.shape), lambda: fused_weight(module))
    return None


def _packed(weight: QuantizedTensor) -> Packed | None:
    return Packed(weight.format, lambda: weight.parts["codes"]) if weight.format in AS_STORED_FORMATS else None


def _plain(name: str, parameter: Tensor) -> LazyTensor:
    return LazyTensor(name, tuple(parameter.shape), lambda: parameter.detach())
