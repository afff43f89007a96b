"""Check a config without training: what would be read, held and trained on.

The model is loaded as for training, since what its layers keep is seen in a pass over a few tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from entrenar.core.config import load_config
from entrenar.data.batches import batch_rows
from entrenar.data.dataset import PreparedData
from entrenar.data.encode import Example
from entrenar.data.packing import computed_tokens, layout
from entrenar.lora.attach import adapted_layers, trained_parameters
from entrenar.planning.memory_plan import MemoryPlan
from entrenar.planning.run_plan import plan_memory
from entrenar.recipes.config import RunConfig
from entrenar.recipes.doubts import doubts
from entrenar.recipes.run_directory import open_run_directory
from entrenar.recipes.run_model import load_adapted, source_of
from entrenar.recipes.train import (
    OBJECTIVE,
    OPTIMIZER,
    fit_trees,
    make_plan,
    prepare_data,
    refuse_foreign_tokens,
    with_date,
)
from entrenar.training.state import Plan

Piece = tuple[str, bool]
# Batches over which padding is counted: a random sample of the rows, as every batch is.
_COUNTED = 100


@dataclass(frozen=True)
class TokenUse:
    """What the model would compute in the run's first `batches` batches: tokens of the rows, and padding."""

    batches: int
    tokens: int
    padding: int

    @property
    def useful(self) -> float:
        """Share of tokens that are not padding."""
        return self.tokens / (self.tokens + self.padding)


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What `entrenar check` shows."""

    config: RunConfig
    data: PreparedData
    total_steps: int
    adapted_layers: int
    trainable_parameters: int
    memory: MemoryPlan
    lengths: list[int]
    use: TokenUse
    samples: list[list[Piece]]
    resumes_from: str | None
    doubts: list[str]


def check(config_path: str | Path, overrides: Mapping[str, Any] | None = None, samples: int = 3) -> CheckReport:
    """Resolve a config, read its data and build its model without weights.

    Raises:
        InputError: everything that `train` would refuse before its first step.
    """
    directory = open_run_directory(load_config(RunConfig, Path(config_path), overrides))
    source = source_of(directory.config)
    data = prepare_data(directory.config, source.tokenizer, source.ends)
    config = with_date(directory, data).config
    model, libraries = load_adapted(config, source)
    refuse_foreign_tokens(data, model, config)
    data = fit_trees(data, model)
    plan = make_plan(config, data)
    memory = plan_memory(config.training, model, data, plan, OBJECTIVE, OPTIMIZER, libraries=libraries)
    trained = [parameter for _, parameter in trained_parameters(model)]
    sequences = [sequence for row in data.train.examples for sequence in OBJECTIVE.sequences(row)]
    lengths = [len(sequence) for sequence in sequences]
    return CheckReport(
        config=config,
        data=data,
        total_steps=plan.total_steps,
        adapted_layers=len(list(adapted_layers(model))),
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        memory=memory,
        lengths=lengths,
        use=_token_use(replace(plan, micro_batch=memory.micro_batch), lengths),
        samples=[_pieces(sequence, source.tokenizer) for sequence in sequences[:samples]],
        resumes_from=str(directory.checkpoint) if directory.checkpoint else None,
        doubts=doubts(config, plan, data, memory.fixed.adapter),
    )


def histogram(lengths: list[int], bins: int = 8) -> list[tuple[int, int, int]]:
    """(from, to, rows) over equal ranges of token counts."""
    low, high = min(lengths), max(lengths)
    width = max(math.ceil((high - low + 1) / bins), 1)
    edges = range(low, high + 1, width)
    return [(start, start + width - 1, sum(start <= n < start + width for n in lengths)) for start in edges]


def _token_use(plan: Plan, lengths: list[int]) -> TokenUse:
    count, tokens, computed = min(plan.total_steps, _COUNTED), 0, 0
    for index in range(count):
        batch = [lengths[row] for row in batch_rows(len(lengths), plan.batch_size, plan.seed, index)]
        tokens += sum(batch)
        computed += computed_tokens(layout(batch, plan.micro_batch, plan.pack_to), batch)
    return TokenUse(count, tokens, computed - tokens)


def _pieces(example: Example, tokenizer: Any) -> list[Piece]:
    """The row as text, in runs of trained and untrained tokens; a branch begins a line that says what it follows."""
    pieces: list[Piece] = []
    for start, end, first in example.runs():
        begin = start
        if start:
            begin += 1  # the token that it shares, once more
            pieces.append((f"\n  ↳ after the first {first + 1} tokens: ", False))
        flags = example.trained[begin:end]
        for trained, run in groupby(range(len(flags)), flags.__getitem__):
            ids = [example.ids[begin + index] for index in run]
            pieces.append((tokenizer.decode(ids, skip_special_tokens=False), trained))
    return pieces
