"""Check a config without training: what would be read, held and trained on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from entrenar.core.config import load_config
from entrenar.data.batches import batch_rows
from entrenar.data.dataset import PreparedData
from entrenar.data.encode import Example
from entrenar.data.packing import computed_tokens, layout
from entrenar.lora.attach import attach, trained_parameters
from entrenar.models.compute import resolve_dtype
from entrenar.models.load import UNQUANTIZED, build_on_meta
from entrenar.models.source import open_source
from entrenar.quant.tensor import packed_bytes
from entrenar.recipes.config import RunConfig
from entrenar.recipes.run_directory import open_run_directory
from entrenar.recipes.train import make_plan, prepare_data
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
    """What `entrenar check` shows; sizes in bytes, exact to the byte."""

    config: RunConfig
    data: PreparedData
    total_steps: int
    adapted_layers: int
    trainable_parameters: int
    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    lengths: list[int]
    use: TokenUse
    samples: list[list[Piece]]
    resumes_from: str | None


def check(config_path: str | Path, overrides: Mapping[str, Any] | None = None, samples: int = 3) -> CheckReport:
    """Resolve a config, read its data and build its model without weights.

    Raises:
        InputError: everything that `train` would refuse before its first step.
    """
    config = load_config(RunConfig, Path(config_path), overrides)
    directory = open_run_directory(config)
    source = open_source(config.model.path)
    data = prepare_data(config, source.tokenizer)
    model = build_on_meta(source, resolve_dtype(config.model.dtype))
    base_bytes = _base_bytes(model, config)
    adapted = attach(model, config.lora.spec())
    trained = [parameter for _, parameter in trained_parameters(model)]
    adapter_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    plan, lengths = make_plan(config, data), [len(example) for example in data.train.examples]
    return CheckReport(
        config=config,
        data=data,
        total_steps=plan.total_steps,
        adapted_layers=len(adapted),
        trainable_parameters=sum(parameter.numel() for parameter in trained),
        base_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        # AdamW: two float32 moments an element, one float32 step counter a tensor.
        optimizer_bytes=2 * adapter_bytes + 4 * len(trained),
        lengths=lengths,
        use=_token_use(plan, lengths),
        samples=[_pieces(example, source.tokenizer) for example in data.train.examples[:samples]],
        resumes_from=str(directory.checkpoint) if directory.checkpoint else None,
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


def _base_bytes(model: PreTrainedModel, config: RunConfig) -> int:
    """Bytes of every base parameter once loaded: packed where quantized, in the compute dtype elsewhere."""
    section, head, total = config.model, model.get_output_embeddings(), 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            quantized = name == "weight" and isinstance(module, nn.Linear) and module is not head
            if quantized and section.quantize != UNQUANTIZED:
                total += packed_bytes(parameter.numel(), section.quantize, section.block_size, section.double_quant)
            elif module is not head or not _is_tied(model):
                total += parameter.numel() * parameter.element_size()
    return total


def _is_tied(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config().tie_word_embeddings)


def _pieces(example: Example, tokenizer: Any) -> list[Piece]:
    """The row as text, in runs of trained and untrained tokens."""
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(example.ids, example.trained, strict=True):
        if not runs or runs[-1][1] != trained:
            runs.append(([], trained))
        runs[-1][0].append(token)
    return [(tokenizer.decode(ids, skip_special_tokens=False), trained) for ids, trained in runs]
