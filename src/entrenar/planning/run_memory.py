"""A run's memory plan: from its config, its data and its model."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.data.batches import batch_rows
from entrenar.data.dataset import PreparedData
from entrenar.data.packing import layout, widest
from entrenar.layers.linear_cross_entropy import LOGIT_BYTES
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.attach import adapted_layers, attach, trained_parameters
from entrenar.lora.token_rows import resize_vocabulary, rows_for
from entrenar.models.acceleration.activations import decoder_layers, kept_per_token, ladder, recompute_inside
from entrenar.models.acceleration.fast_layers import serve
from entrenar.models.experts import expert_modules
from entrenar.models.head import output_head, vocabulary_size
from entrenar.opening.compute import resolve_device, resolve_dtype
from entrenar.opening.load import KEEP, UNQUANTIZED, build_on_meta, kept_types, load_source
from entrenar.opening.match import is_tied
from entrenar.opening.original import weights_of
from entrenar.opening.source import ModelSource, open_source
from entrenar.ops import gpu_kernels
from entrenar.ops.linear_weight import CodebookWeight
from entrenar.planning.device_memory import free_bytes, used_bytes
from entrenar.planning.memory_plan import HEAP, Held, MemoryPlan, Working, make_memory_plan
from entrenar.quant.tensor import packed_bytes
from entrenar.recipes.config import ModelSection, RunConfig, TrainingSection
from entrenar.training.state import Plan

_MOST_TOKENS = 4096  # beyond, a larger micro-batch gains nothing
_USABLE = 0.9  # of what is available: the estimate is not exact, and others live on the machine
_AT_WORK = 24 << 20  # buffers of MKL, oneDNN and our kernels (measured)
_AT_WORK_GPU = 32 << 20  # cuBLAS' (torch's setting for Hopper)
_GPU_DECODING = 10  # bytes a weight while a reference decodes it: an index, and two float32 values
# What passes in a layer's backward for each byte that it keeps. Of the layers of layers/composed_blocks.py, by the
# tensors that are alive at once: 0.95 for Llama 1.1B (measured on a CPU: 1.0), more where the MLP is wide.
_PASSING, _PASSING_COMPOSED = 2.0, 1.25
_COUNTED = 1000  # batches whose layout is looked at


def plan_memory(
    section: TrainingSection, model: PreTrainedModel, data: PreparedData, plan: Plan, *, libraries: int, chosen: int = 0
) -> MemoryPlan:
    """The plan of an adapted model that is about to be trained; puts it into training mode.

    Args:
        libraries: bytes the process held before the model was loaded.
        chosen: the micro-batch of a run that is resumed; 0: a new run.

    Raises:
        InputError: nothing fits into what the config allows or the machine has.
    """
    model.train()
    kept = {choice: kept_per_token(model, choice) for choice in ladder(model)}
    working = Working(
        layers=len(decoder_layers(model)),
        kept=kept,
        logits=_logit_bytes(model),
        scratch=_scratch(model),
        heap=HEAP if model.device.type == "cpu" else 1.0,
        passing=_passing(model),
    )
    held, budget = held_bytes(model, libraries), memory_budget(section, model.device)
    tokens = _tokens(section, data, plan, chosen)
    found = make_memory_plan(held, working, tokens, budget, least=section.memory == "min")
    if not found.fits:
        raise InputError(
            f"training needs about {found.total:,} bytes with everything recomputed and {found.micro_batch} rows at a "
            f"time, but {_source(section, model.device)} {found.budget or 0:,}: give it more, or lower "
            "data.max_length, training.micro_batch or lora.rank"
        )
    return found


def open_for(config: RunConfig) -> ModelSource:
    """The model of a config, its tokenizer with the config's new tokens."""
    source = open_source(config.model.path)
    if config.lora.new_tokens:
        source.tokenizer.add_tokens(config.lora.new_tokens)
    return source


def load_adapted(config: RunConfig, source: ModelSource) -> tuple[PreTrainedModel, int]:
    """The model of a config with fresh adapters, and the bytes that were held where it computes before: libraries.

    Raises:
        InputError: its weights alone exceed what may be held; nothing was loaded.
    """
    section = config.model
    device = resolve_device(section.device)
    dtype = resolve_dtype(section.dtype, device)
    _refuse_large(source, config, dtype, device)  # imports the architecture's code, too
    libraries = used_bytes(device)
    model = load_source(
        source, section.quantize, section.double_quant, section.block_size, dtype, search=section.search, device=device
    )
    torch.manual_seed(config.training.seed)
    attach(model, config.lora.spec(_new_rows(model, source, config.lora.new_tokens)), weights_of(source))
    return model, libraries


def _new_rows(model: PreTrainedModel, source: ModelSource, new_tokens: list[str]) -> dict[str, list[int]]:
    """Rows for the new tokens, and which they are."""
    if not new_tokens:
        return {}
    tokens = cast(list[int], source.tokenizer.convert_tokens_to_ids(new_tokens))
    resize_vocabulary(model, 1 + max(tokens))
    return rows_for(model, tokens)


def memory_budget(section: TrainingSection, device: torch.device) -> int | None:
    """Bytes that the process may hold in all where the model computes."""
    if isinstance(section.memory, int):
        return section.memory
    free = free_bytes(device)
    return None if free is None else round(_USABLE * (free + used_bytes(device)))


def held_bytes(model: nn.Module, libraries: int) -> Held:
    """What an adapted model holds all the time; AdamW: two float32 moments an element, a step counter a tensor."""
    factors = [parameter for _, parameter in trained_parameters(model)]
    adapter = sum(factor.numel() * factor.element_size() for factor in factors)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensors in (model.parameters(), model.buffers())
        for tensor in tensors
    }
    layers = [layer for _, layer in adapted_layers(model)]
    taken = [factor for layer in layers for factor in layer.taken or () if factor.device == layer.lora_a.device]
    base = sum(storages.values()) - adapter + sum(factor.numel() * factor.element_size() for factor in taken)
    return Held(
        libraries=libraries, base=base, adapter=adapter, gradients=adapter, optimizer=2 * adapter + 4 * len(factors)
    )


def _source(section: TrainingSection, device: torch.device) -> str:
    where = "machine" if device.type == "cpu" else "GPU"
    return "training.memory allows" if isinstance(section.memory, int) else f"this {where} has only"


def _tokens(section: TrainingSection, data: PreparedData, plan: Plan, chosen: int) -> dict[int, int]:
    """Micro-batches to choose from → tokens of the largest one a run will meet."""
    lengths = [len(example) for example in data.train.examples]
    batches = [
        [lengths[row] for row in batch_rows(len(lengths), plan.batch_size, plan.seed, index)]
        for index in range(min(plan.total_steps, _COUNTED))
    ]
    found: dict[int, int] = {}
    for micro_batch in [chosen] if chosen else _sizes(section):
        most = max(widest(layout(batch, micro_batch, plan.pack_to), batch) for batch in batches)
        if found and (most > _MOST_TOKENS or most == max(found.values())):
            break
        found[micro_batch] = most
    return found


def _sizes(section: TrainingSection) -> Iterable[int]:
    if isinstance(section.micro_batch, int):
        return [min(section.micro_batch, section.batch_size)]
    powers = [2**power for power in range(section.batch_size.bit_length())]
    return sorted({*powers, section.batch_size})


def _logit_bytes(model: PreTrainedModel) -> int:
    """Of one chunk of the loss: logits over which the gradient is written, and what else is made of them."""
    whole = _MOST_TOKENS * vocabulary_size(model) * model.dtype.itemsize
    copies = 1 if type(output_head(model)) is nn.Linear else 3  # autograd has both, and holds some of them
    if model.device.type != "cpu" and not gpu_kernels.are_there():
        copies += 2 * torch.float32.itemsize / model.dtype.itemsize  # z and its softmax in float32
    return round(min(LOGIT_BYTES, whole) * copies)


def _scratch(model: PreTrainedModel) -> int:
    """Of the libraries and our kernels at work; and on a GPU of the largest of the weights, which are decoded whole."""
    if model.device.type == "cpu":
        return _AT_WORK
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return _AT_WORK_GPU + max((_decoding_bytes(layer, model.dtype) for layer in layers), default=0)


def _decoding_bytes(layer: QuantizedLinear, dtype: torch.dtype) -> int:
    by_kernel = gpu_kernels.are_there() and isinstance(layer.linear_weight(), CodebookWeight)
    return layer.in_features * layer.out_features * (dtype.itemsize + (0 if by_kernel else _GPU_DECODING))


def _passing(model: PreTrainedModel) -> float:
    composed = serve(model) and not recompute_inside(model) and gpu_kernels.are_there()
    return _PASSING_COMPOSED if composed else _PASSING


def _refuse_large(source: ModelSource, config: RunConfig, dtype: torch.dtype, device: torch.device) -> None:
    base_bytes = _base_bytes(build_on_meta(source, dtype), source, config.model, dtype)
    budget = memory_budget(config.training, device)
    if budget is not None and base_bytes > budget:
        raise InputError(
            f"the weights of {config.model.path} alone take {base_bytes:,} bytes as {config.model.quantize}, and "
            f"training.memory or this machine allows {budget:,} bytes: choose a smaller model or a smaller "
            "model.quantize, or allow more (a size is written as 6GB)"
        )


def _base_bytes(model: PreTrainedModel, source: ModelSource, section: ModelSection, dtype: torch.dtype) -> int:
    """Bytes of every base parameter once loaded: packed where quantized or kept, in the compute dtype elsewhere."""
    head, total = model.get_output_embeddings(), 0
    kept = kept_types(model, source, dtype) if section.quantize == KEEP else {}
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
            elif quantized and section.quantize not in (UNQUANTIZED, KEEP):
                total += packed_bytes(parameter.numel(), section.quantize, section.block_size, section.double_quant)
            elif module is not head or not is_tied(model):
                total += parameter.numel() * parameter.element_size()
    return total
