"""Fine-tune: config → data → model → loop → adapter."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from entrenar.core.atomic import write_text
from entrenar.core.config import load_config
from entrenar.core.errors import listing
from entrenar.data.batches import batches_per_epoch
from entrenar.data.dataset import PreparedData, prepare
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import trained_parameters
from entrenar.models.activations import set_keep
from entrenar.models.compute import resolve_device
from entrenar.models.device_memory import peak_memory
from entrenar.models.isolation import isolates_documents
from entrenar.models.source import ModelSource
from entrenar.optim.adamw import make_adamw
from entrenar.optim.groups import lora_plus_groups
from entrenar.recipes.config import RunConfig
from entrenar.recipes.memory import load_adapted, open_for, plan_memory
from entrenar.recipes.run_directory import RunDirectory, open_run_directory
from entrenar.training.checkpoint import load_checkpoint
from entrenar.training.loop import OnStep, Trainer
from entrenar.training.memory_plan import MemoryPlan
from entrenar.training.state import Plan, State

RESULT_NAME = "result.json"
Say = Callable[[str], None]


def _ignore(_: object) -> None:
    """Without a listener, reports go nowhere; they are in metrics.jsonl all the same."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run left; losses in nats per target token, memory: peak bytes where it ran
    (models/device_memory.py), as measured and as planned."""

    run_dir: str
    adapter: str
    steps: int
    tokens: int
    train_loss: float | None
    eval_loss: float | None
    seconds: float
    peak_memory_bytes: int
    planned_memory_bytes: int
    resumed_from_step: int


def train(
    config: str | Path | RunConfig,
    overrides: Mapping[str, Any] | None = None,
    *,
    on_step: OnStep = _ignore,
    say: Say = _ignore,
) -> TrainResult:
    """Run a config to its end, from its newest checkpoint if there is one.

    Args:
        config: path of a YAML config, or a RunConfig. overrides: dotted key → value, e.g. {"optimizer.lr": 1e-4}.
        on_step: called after every step. say: called with sentences for the user.

    Raises:
        InputError: a mistake in config, data or model. StoppedError: a signal came; a checkpoint was written.
    """
    settings = config if isinstance(config, RunConfig) else load_config(RunConfig, Path(config), overrides)
    directory = open_run_directory(settings)
    if directory.is_finished:
        say(f"{directory.path} is a finished run of this config; nothing to do")
        return TrainResult(**json.loads((directory.path / RESULT_NAME).read_text(encoding="utf-8")))
    started = time.monotonic()
    with peak_memory(resolve_device(settings.model.device)) as memory:
        ran = _run(settings, directory, on_step, say)
    state = ran.state
    result = TrainResult(
        run_dir=str(directory.path),
        adapter=str(directory.adapter),
        steps=state.step,
        tokens=state.tokens,
        train_loss=state.train_loss,
        eval_loss=state.best_loss if settings.eval.patience else state.eval_loss,
        seconds=time.monotonic() - started,
        peak_memory_bytes=memory.peak,
        planned_memory_bytes=ran.memory.total,
        resumed_from_step=ran.resumed,
    )
    write_text(directory.path / RESULT_NAME, json.dumps(asdict(result), indent=2) + "\n")
    return result


@dataclass(frozen=True)
class _Ran:
    state: State
    resumed: int
    memory: MemoryPlan


def _run(config: RunConfig, directory: RunDirectory, on_step: OnStep, say: Say) -> _Ran:
    source = open_for(config)
    data = prepare_data(config, source.tokenizer)
    say(describe(data, config.data.train))
    model, libraries = load_adapted(config, source)
    where = "machine"
    if model.device.type == "cuda":
        where = "GPU"
        say(f"computing on {torch.cuda.get_device_name(model.device)}")
    if config.model.dtype == "auto" and model.dtype is torch.float32:
        say(f"computing in float32: this {where} has no native bfloat16")
    plan = make_plan(config, data)
    if plan.pack_to and not isolates_documents(model):
        say(f"no packing: {type(model).__name__} mixes documents that share a row, so each gets a row of its own")
        plan = replace(plan, pack_to=0)
    options = config.optimizer
    groups = lora_plus_groups(trained_parameters(model), options.lora_plus_ratio)
    optimizer = make_adamw(groups, options.lr, (options.beta1, options.beta2), options.eps, options.weight_decay)
    state = State(data.fingerprint)
    if directory.checkpoint:
        state = load_checkpoint(directory.checkpoint, model, optimizer, data.fingerprint)
        say(f"resuming from step {state.step}")
    resumed = state.step
    memory = plan_memory(config.training, model, data, plan, libraries=libraries, chosen=state.micro_batch)
    say(memory.sentence())
    set_keep(model, memory.keep)
    state.micro_batch = memory.micro_batch
    plan = replace(plan, micro_batch=memory.micro_batch)
    directory.start(config)
    _write_rejected(directory, data)
    Trainer(model, optimizer, data, plan, state, directory.path, pad_id(source), on_step).run()
    save_adapter(model, directory.adapter, tokenizer=source.tokenizer if config.lora.new_tokens else None)
    return _Ran(state, resumed, memory)


def prepare_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """The data of a config, encoded."""
    section = config.data
    return prepare(
        tokenizer,
        Path(section.train),
        Path(section.validation) if section.validation else None,
        validation_fraction=section.validation_fraction,
        max_length=section.max_length,
        too_long=section.too_long,
        seed=config.training.seed,
        date=getattr(section, "date", None),
    )


def make_plan(config: RunConfig, data: PreparedData) -> Plan:
    """Turn epochs into steps; a `micro_batch` that is auto is the whole batch until a memory plan says less."""
    training, per_epoch = config.training, batches_per_epoch(len(data.train), config.training.batch_size)
    total = min(training.epochs * per_epoch, training.max_steps or training.epochs * per_epoch)
    return Plan(
        total_steps=total,
        batch_size=training.batch_size,
        micro_batch=training.batch_size
        if training.micro_batch == "auto"
        else min(training.micro_batch, training.batch_size),
        pack_to=config.data.max_length if config.data.packing else 0,
        seed=training.seed,
        lr=config.optimizer.lr,
        schedule=config.optimizer.schedule,
        warmup_steps=config.optimizer.warmup_steps,
        max_grad_norm=config.optimizer.max_grad_norm,
        eval_every=(config.eval.every_steps or per_epoch) if data.validation else 0,
        patience=config.eval.patience,
        checkpoint_every=config.checkpoint.every_steps,
        keep_checkpoints=config.checkpoint.keep,
    )


def describe(data: PreparedData, path: str) -> str:
    """One sentence on what was read."""
    parts = [f"{path}: {data.shape} rows, {len(data.train)} to train on"]
    if data.validation:
        parts.append(f"{len(data.validation)} held out")
    if data.truncated:
        parts.append(f"{data.truncated} truncated")
    if data.silent_turns:
        parts.append(f"{data.silent_turns} assistant turns without a word, not trained")
    if data.unused:
        parts.append(f"not used: {listing(data.unused)}")
    if data.rejected:
        first = data.rejected[0]
        parts.append(f"{len(data.rejected)} rejected (first: {first.file}:{first.line}: {first.reason})")
    return ", ".join(parts)


def pad_id(source: ModelSource) -> int:
    """Any token id: padding is masked everywhere."""
    own = source.tokenizer.pad_token_id
    return own if isinstance(own, int) else 0


def _write_rejected(directory: RunDirectory, data: PreparedData) -> None:
    if data.rejected:
        lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in data.rejected)
        write_text(directory.path / "rejected.jsonl", lines)
