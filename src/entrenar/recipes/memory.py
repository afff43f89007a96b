"""A run's memory plan: from its config, its data and its model."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.core.memory import anonymous_bytes, available_bytes
from entrenar.data.batches import batch_rows
from entrenar.data.dataset import PreparedData
from entrenar.data.packing import layout, widest
from entrenar.lora.attach import adapted_layers, attach, trained_parameters
from entrenar.models.activations import decoder_layers, kept_per_token, ladder
from entrenar.models.compute import resolve_dtype
from entrenar.models.head import output_head, vocabulary_size
from entrenar.models.linear_cross_entropy import LOGIT_BYTES
from entrenar.models.load import KEEP, UNQUANTIZED, build_on_meta, kept_types, load_source
from entrenar.models.match import is_tied
from entrenar.models.original import weights_of
from entrenar.models.source import ModelSource
from entrenar.ops.linear_weight import DecodedWeight
from entrenar.quant.linear import QuantizedLinear
from entrenar.quant.tensor import packed_bytes
from entrenar.recipes.config import ModelSection, RunConfig, TrainingSection
from entrenar.training.memory_plan import Held, MemoryPlan, Working, make_memory_plan
from entrenar.training.state import Plan

_MOST_TOKENS = 4096  # beyond, a larger micro-batch gains nothing
_USABLE = 0.9  # of what is available: the estimate is not exact, and others live on the machine
_AT_WORK = 24 << 20  # buffers of MKL, oneDNN and our kernels (measured)
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
    working = Working(layers=len(decoder_layers(model)), kept=kept, logits=_logit_bytes(model), scratch=_scratch(model))
    held, budget = held_bytes(model, libraries), memory_budget(section)
    tokens = _tokens(section, data, plan, chosen)
    found = make_memory_plan(held, working, tokens, budget, least=section.memory == "min")
    if not found.fits:
        raise InputError(
            f"training needs about {found.total:,} bytes with everything recomputed and {found.micro_batch} rows at a "
            f"time, but {_source(section)} {found.budget or 0:,}: give it more, or lower data.max_length, "
            "training.micro_batch or lora.rank"
        )
    return found


def load_adapted(config: RunConfig, source: ModelSource) -> tuple[PreTrainedModel, int]:
    """The model of a config with fresh adapters, and the bytes that the process held before: its libraries.

    Raises:
        InputError: its weights alone exceed what may be held; nothing was loaded.
    """
    section = config.model
    dtype = resolve_dtype(section.dtype)
    _refuse_large(source, config, dtype)  # imports the architecture's code, too
    libraries = anonymous_bytes()
    model = load_source(
        source, section.quantize, section.double_quant, section.block_size, dtype, search=section.search
    )
    torch.manual_seed(config.training.seed)
    attach(model, config.lora.spec(), weights_of(source))
    return model, libraries


def memory_budget(section: TrainingSection) -> int | None:
    """Anonymous bytes that the process may hold in all."""
    if isinstance(section.memory, int):
        return section.memory
    free = available_bytes()
    return None if free is None else round(_USABLE * (free + anonymous_bytes()))


def held_bytes(model: nn.Module, libraries: int) -> Held:
    """What an adapted model holds all the time; AdamW: two float32 moments an element, a step counter a tensor."""
    factors = [parameter for _, parameter in trained_parameters(model)]
    adapter = sum(factor.numel() * factor.element_size() for factor in factors)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensors in (model.parameters(), model.buffers())
        for tensor in tensors
    }
    taken = [factor for _, layer in adapted_layers(model) for factor in layer.taken or ()]
    base = sum(storages.values()) - adapter + sum(factor.numel() * factor.element_size() for factor in taken)
    return Held(
        libraries=libraries, base=base, adapter=adapter, gradients=adapter, optimizer=2 * adapter + 4 * len(factors)
    )


def _source(section: TrainingSection) -> str:
    return "training.memory allows" if isinstance(section.memory, int) else "this machine has only"


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
    """A plain head writes a chunk's gradient over its logits; another has both, and what autograd holds of them."""
    whole = _MOST_TOKENS * vocabulary_size(model) * model.dtype.itemsize
    return min(LOGIT_BYTES, whole) * (1 if type(output_head(model)) is nn.Linear else 3)


def _scratch(model: PreTrainedModel) -> int:
    """Of the libraries' and our kernels at work; and the largest of the weights that are decoded whole."""
    weights = (module.linear_weight() for module in model.modules() if isinstance(module, QuantizedLinear))
    decoded = [weight.shape[0] * weight.shape[1] for weight in weights if isinstance(weight, DecodedWeight)]
    return _AT_WORK + max(decoded, default=0) * model.dtype.itemsize


def _refuse_large(source: ModelSource, config: RunConfig, dtype: torch.dtype) -> None:
    base_bytes = _base_bytes(build_on_meta(source, dtype), source, config.model, dtype)
    budget = memory_budget(config.training)
    if budget is not None and base_bytes > budget:
        raise InputError(
            f"the weights of {config.model.path} alone take {base_bytes:,} bytes as {config.model.quantize}, and "
            f"training.memory or this machine allows {budget:,}: choose a smaller model or a smaller model.quantize"
        )


def _base_bytes(model: PreTrainedModel, source: ModelSource, section: ModelSection, dtype: torch.dtype) -> int:
    """Bytes of every base parameter once loaded: packed where quantized or kept, in the compute dtype elsewhere."""
    head, total = model.get_output_embeddings(), 0
    kept = kept_types(model, source, dtype) if section.quantize == KEEP else {}
    packed = source.packed.packed() if source.packed else {}
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{owner}.{name}".removeprefix(".")
            quantized = name == "weight" and isinstance(module, nn.Linear) and module is not head
            if full_name in kept and source.blocks:
                total += source.blocks.packed(full_name).size
            elif full_name in packed and source.packed:
                total += source.packed.packed_bytes(full_name)
            elif quantized and section.quantize not in (UNQUANTIZED, KEEP):
                total += packed_bytes(parameter.numel(), section.quantize, section.block_size, section.double_quant)
            elif module is not head or not is_tied(model):
                total += parameter.numel() * parameter.element_size()
    return total
