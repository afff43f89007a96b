"""What does not depend on the batch: the base's weights, the adapter, its gradients, the optimiser's state."""

import torch
from torch import nn
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.lora.attach import adapted_layers, trained_parameters
from entrenar.models.experts import expert_modules
from entrenar.opening.as_stored import AS_STORED, UNQUANTIZED, weights_as_stored
from entrenar.opening.build import build_on_meta
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
    needed = base_bytes(build_on_meta(source, dtype), source, base, dtype)
    budget = memory_budget(memory, device)
    if budget is not None and needed > budget:
        raise InputError(
            f"the weights of {base.path} alone take {needed:,} bytes as {base.quantize}, and "
            f"training.memory or this machine allows {budget:,} bytes: choose a smaller model or a smaller "
            "model.quantize, or allow more (a size is written as 6GB)"
        )


def base_bytes(model: PreTrainedModel, source: ModelSource, base: BaseSettings, dtype: torch.dtype) -> int:
    """Bytes of every base parameter once loaded: its codes and scales where it is quantized, else the compute dtype."""
    head, total = model.get_output_embeddings(), 0
    as_stored = weights_as_stored(model, source, base.quantize, dtype)
    mixtures = expert_modules(model)
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{owner}.{name}".removeprefix(".")
            linear = name == "weight" and isinstance(module, nn.Linear) and module is not head
            quantized = linear or owner in mixtures
            if full_name in as_stored:
                total += as_stored[full_name].count_bytes()
            elif quantized and base.quantize not in (UNQUANTIZED, AS_STORED):
                total += packed_bytes(parameter.numel(), base.quantize, base.block_size, base.double_quant)
            elif module is not head or not is_tied(model):
                total += parameter.numel() * parameter.element_size()
    return total
