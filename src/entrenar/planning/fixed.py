"""What does not depend on the batch: the base's weights, the adapter, its gradients, the optimiser's state."""

import torch
from torch import nn
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.lora.attach import adapted_layers, trained_parameters
from entrenar.models.experts import expert_modules
from entrenar.opening.load import KEEP, UNQUANTIZED, build_on_meta, kept_types
from entrenar.opening.match import is_tied
from entrenar.opening.source import ModelSource
from entrenar.optim.optimizers import OptimizerKind
from entrenar.planning.budget import memory_budget
from entrenar.planning.memory_plan import Fixed
from entrenar.planning.settings import BaseSettings, MemorySettings
from entrenar.quant.tensor import packed_bytes


def fixed_bytes(model: nn.Module, libraries: int, optimizer: OptimizerKind) -> Fixed:
    """Of an adapted model that is loaded."""
    factors = [parameter for _, parameter in trained_parameters(model)]
    adapter = _bytes(factors)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensors in (model.parameters(), model.buffers())
        for tensor in tensors
    }
    layers = [layer for _, layer in adapted_layers(model)]
    taken = [factor for layer in layers for factor in layer.taken or () if factor.device == layer.lora_a.device]
    return Fixed(
        libraries=libraries,
        base=sum(storages.values()) - adapter + _bytes(taken),
        adapter=adapter,
        gradients=adapter,
        optimizer=optimizer.state_bytes(factors),
    )


def _bytes(tensors: list[nn.Parameter] | list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def refuse_too_large(
    source: ModelSource, base: BaseSettings, memory: MemorySettings, dtype: torch.dtype, device: torch.device
) -> None:
    """InputError if the base's weights alone exceed what may be held; nothing is loaded."""
    base_bytes = _base_bytes(build_on_meta(source, dtype), source, base, dtype)
    budget = memory_budget(memory, device)
    if budget is not None and base_bytes > budget:
        raise InputError(
            f"the weights of {base.path} alone take {base_bytes:,} bytes as {base.quantize}, and "
            f"training.memory or this machine allows {budget:,} bytes: choose a smaller model or a smaller "
            "model.quantize, or allow more (a size is written as 6GB)"
        )


def _base_bytes(model: PreTrainedModel, source: ModelSource, base: BaseSettings, dtype: torch.dtype) -> int:
    """Bytes of every base parameter once loaded: packed where quantized or kept, in the compute dtype elsewhere."""
    head, total = model.get_output_embeddings(), 0
    kept = kept_types(model, source, dtype) if base.quantize == KEEP else {}
    packed = source.packed.packed() if source.packed else {}
    mixtures = expert_modules(model)
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{owner}.{name}".removeprefix(".")
            linear = name == "weight" and isinstance(module, nn.Linear) and module is not head
            quantized = linear or owner in mixtures
            if full_name in kept and source.blocks:
                total += source.blocks.packed(full_name).size
            elif full_name in packed and source.packed:
                total += source.packed.packed_bytes(full_name)
            elif quantized and base.quantize not in (UNQUANTIZED, KEEP):
                total += packed_bytes(parameter.numel(), base.quantize, base.block_size, base.double_quant)
            elif module is not head or not is_tied(model):
                total += parameter.numel() * parameter.element_size()
    return total
