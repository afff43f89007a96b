"""A run's memory plan: from its settings, its data and its model."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.data.batches import batch_rows
from entrenar.data.dataset import PreparedData
from entrenar.data.packing import layout, widest
from entrenar.objectives.objective import Objective
from entrenar.optim.optimizers import OptimizerKind
from entrenar.planning.budget import budget_words, memory_budget
from entrenar.planning.fixed import fixed_bytes
from entrenar.planning.memory_plan import MemoryPlan, make_memory_plan
from entrenar.planning.settings import BatchSettings, MemorySettings
from entrenar.planning.trial import MAX_TOKENS, measured_activations

_COUNTED = 1000  # batches whose layout is looked at


def plan_memory(
    settings: MemorySettings,
    model: PreTrainedModel,
    data: PreparedData,
    batches: BatchSettings,
    objective: Objective,
    optimizer: OptimizerKind,
    *,
    libraries: int,
    chosen: int = 0,
) -> MemoryPlan:
    """The plan of an adapted model that is about to be trained; puts it into training mode.

    Args:
        libraries: bytes the process held before the model was loaded.
        chosen: the micro-batch of a run that is resumed; 0: a new run.

    Raises:
        InputError: nothing fits into what the config allows or the machine has.
    """
    model.train()
    plan = make_memory_plan(
        fixed_bytes(model, libraries, optimizer),
        measured_activations(model, objective),
        _tokens(settings, data, batches, objective, chosen),
        memory_budget(settings, model.device),
        smallest=settings.memory == "min",
    )
    if not plan.fits:
        raise InputError(
            f"training needs about {plan.total:,} bytes with everything recomputed and {plan.micro_batch} rows at a "
            f"time, but {budget_words(settings, model.device)} {plan.budget or 0:,}: give it more, or lower "
            "data.max_length, training.micro_batch or lora.rank"
        )
    return plan


def _tokens(
    settings: MemorySettings, data: PreparedData, batches: BatchSettings, objective: Objective, chosen: int
) -> dict[int, int]:
    """Micro-batches to choose from → tokens of the largest one a run will meet."""
    lengths = [[len(sequence) for sequence in objective.sequences(row)] for row in data.train.examples]
    of_batches = [
        [length for row in batch_rows(len(lengths), batches.batch_size, batches.seed, index) for length in lengths[row]]
        for index in range(min(batches.total_steps, _COUNTED))
    ]
    tokens: dict[int, int] = {}
    for micro_batch in [chosen] if chosen else _sizes(settings):
        largest = max(widest(layout(of_one, micro_batch, batches.pack_to), of_one) for of_one in of_batches)
        if tokens and (largest > MAX_TOKENS or largest == max(tokens.values())):
            break
        tokens[micro_batch] = largest
    return tokens


def _sizes(settings: MemorySettings) -> Iterable[int]:
    if isinstance(settings.micro_batch, int):
        return [min(settings.micro_batch, settings.batch_size)]
    powers = [2**power for power in range(settings.batch_size.bit_length())]
    return sorted({*powers, settings.batch_size})
