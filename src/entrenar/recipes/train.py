"""Fine-tune: config → data → model → loop → adapter."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.atomic import write_text
from entrenar.core.config import load_config
from entrenar.core.errors import InputError, listing
from entrenar.core.run_log import read_metrics
from entrenar.data.batches import batches_per_epoch
from entrenar.data.dataset import PreparedData, prepare
from entrenar.data.feed import Feed, feed_of
from entrenar.data.gather import told
from entrenar.data.sources import source_names
from entrenar.data.turn_end import template_of
from entrenar.evaluation.perplexity import separated
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, trained_parameters
from entrenar.lora.embedding import EmbeddingLoRALayer
from entrenar.models.acceleration.activations import set_recompute
from entrenar.models.head import padding_id, vocabulary_size
from entrenar.models.isolation import isolates_documents
from entrenar.objectives.registry import OBJECTIVES
from entrenar.opening.compute import resolve_device, resolve_dtype
from entrenar.opening.source import ModelSource
from entrenar.optim.groups import lora_plus_groups
from entrenar.optim.optimizers import OPTIMIZERS, OptimizerOptions
from entrenar.planning.device_memory import peak_memory
from entrenar.planning.memory_plan import MemoryPlan
from entrenar.planning.run_plan import plan_memory
from entrenar.recipes.config import DataSection, RunConfig
from entrenar.recipes.doubts import afterthoughts, doubts
from entrenar.recipes.identity import base_identity
from entrenar.recipes.run_directory import RunDirectory, locked, open_run_directory, sweep
from entrenar.recipes.run_model import load_adapted, source_of
from entrenar.recipes.train_result import TrainResult, finite, result_of_finished, write_result
from entrenar.training.checkpoint import BEST, drop_older, load_checkpoint
from entrenar.training.learner import Learner
from entrenar.training.loop import OnStep, Trainer
from entrenar.training.loss_scale import first_scale
from entrenar.training.state import Plan, State

Say = Callable[[str], None]
# The only ones so far; a config that chooses would choose here.
OBJECTIVE, OPTIMIZER = OBJECTIVES["supervised"], OPTIMIZERS["adamw"]


def _ignore(_: object) -> None:
    """Without a listener, reports go nowhere; they are in metrics.jsonl all the same."""


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
    started = time.monotonic()
    with locked(settings):
        directory = open_run_directory(settings)
        sweep(directory)
        if directory.is_finished:
            say(f"{directory.path} is a finished run of this config; nothing to do")
            drop_older(directory.checkpoints, BEST, keep=1)
            return result_of_finished(directory, say)
        with peak_memory(resolve_device(settings.model.device)) as memory:
            ran = _run(directory, started, on_step, say)
        result = _result(directory, ran, memory.peak)
        # The order matters: with the adapter's rename the run is finished, and everything else must be there then.
        write_result(directory, result)
        save_adapter(ran.model, directory.adapter, tokenizer=ran.tokenizer, feed=ran.feed)
        drop_older(directory.checkpoints, BEST, keep=1)
        for sentence in afterthoughts(read_metrics(directory.metrics)):
            say(sentence)
    return result


@dataclass(frozen=True)
class _Ran:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    feed: Feed
    state: State
    resumed: int
    memory: MemoryPlan


def _run(directory: RunDirectory, started: float, on_step: OnStep, say: Say) -> _Ran:
    asked = directory.config
    source = source_of(asked)
    data = prepare_data(asked, source.tokenizer, source.ends)
    feed = _feed(source, data, asked.data)
    directory = with_date(directory, data)
    say(describe(data))
    if data.date:
        say(f"the chat template writes the day's date: it is {data.date} for the whole run (data.date)")
    model, libraries = load_adapted(directory.config, source)
    refuse_foreign_tokens(data, model, directory.config)
    data = fit_trees(data, model, say)
    where = "machine"
    if model.device.type == "cuda":
        where = "GPU"
        say(f"computing on {torch.cuda.get_device_name(model.device)}")
    # Not the model's own answer: that is its first parameter's dtype, over a kept GGUF a factor's, always float32.
    dtype = resolve_dtype(directory.config.model.dtype, model.device)
    if asked.model.dtype == "auto" and dtype is torch.float32:
        say(f"computing in float32: this {where} has no native bfloat16")
    directory = directory.fixing("model", dtype=str(dtype).removeprefix("torch."))
    config = directory.config
    plan = make_plan(config, data)
    if plan.pack_to and not isolates_documents(model):
        say(f"no packing: {type(model).__name__} mixes documents that share a row, so each gets a row of its own")
        plan = replace(plan, pack_to=0)
    optimizer = make_optimizer(config, model)
    base = base_identity(source)
    state = State(data.fingerprint, base, loss_scale=first_scale(dtype))
    if directory.checkpoint:
        state = load_checkpoint(directory.checkpoint, model, optimizer, data.fingerprint, base)
        say(f"resuming from step {state.step}")
    resumed = state.step
    state.sessions += 1
    memory = plan_memory(
        config.training, model, data, plan, OBJECTIVE, OPTIMIZER, libraries=libraries, chosen=state.micro_batch
    )
    say(memory.sentence())
    for sentence in doubts(config, plan, data, memory.fixed.adapter):
        say(sentence)
    set_recompute(model, memory.recompute)
    state.micro_batch = memory.micro_batch
    plan = replace(plan, micro_batch=memory.micro_batch)
    directory.start()
    _write_rejected(directory, data)
    Trainer(
        Learner(model, optimizer, OBJECTIVE, OPTIMIZER),
        data,
        plan,
        state,
        directory.path,
        padding_id(model, source.tokenizer.pad_token_id),
        on_step,
        started,
    ).run()
    return _Ran(model, source.tokenizer if config.lora.new_tokens else None, feed, state, resumed, memory)


def _feed(source: ModelSource, data: PreparedData, section: DataSection) -> Feed:
    """What the adapter remembers of how its rows became tokens."""
    template = template_of(source.tokenizer, ends=source.ends, options=section.template)
    return feed_of(template, is_chat=any(row.messages for row in data.train.rows), date=data.date)


def _result(directory: RunDirectory, ran: _Ran, peak: int) -> TrainResult:
    state = ran.state
    return TrainResult(
        run_dir=str(directory.path),
        adapter=str(directory.adapter),
        steps=state.step,
        tokens=state.tokens,
        train_loss=state.train_loss,
        eval_loss=finite(state.best_loss if directory.config.eval.patience else state.eval_loss),
        seconds=state.seconds,
        sessions=state.sessions,
        peak_memory_bytes=peak,
        planned_memory_bytes=ran.memory.total,
        resumed_from_step=ran.resumed,
    )


def make_optimizer(config: RunConfig, model: PreTrainedModel) -> torch.optim.Optimizer:
    """The optimiser over all that is trained, in LoRA+'s groups."""
    options = config.optimizer
    embedding = {
        f"{name}.{factor}"
        for name, layer in adapted_layers(model)
        if isinstance(layer, EmbeddingLoRALayer)
        for factor in ("lora_a", "lora_b")
    }
    groups = lora_plus_groups(
        trained_parameters(model), options.lora_plus_ratio, embedding, options.lora_plus_embedding_lr / options.lr
    )
    return OPTIMIZER.make(
        groups,
        OptimizerOptions(
            lr=options.lr,
            beta1=options.beta1,
            beta2=options.beta2,
            eps=options.eps,
            weight_decay=options.weight_decay,
        ),
    )


def with_date(directory: RunDirectory, data: PreparedData) -> RunDirectory:
    """A day that the chat template wrote into the rows stays the run's."""
    return directory.fixing("data", date=data.date) if data.date else directory


def prepare_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, ends: Any = None) -> PreparedData:
    """The data of a config, encoded; InputError where a share to hold out leaves no row to validate on. `ends`: see
    `prepare`."""
    section = config.data
    data = prepare(
        tokenizer,
        section.train,
        section.validation,
        validation_fraction=section.validation_fraction,
        max_length=section.max_length,
        too_long=section.too_long,
        seed=config.training.seed,
        date=section.date,
        ends=ends,
        options=section.row_options,
    )
    if section.validation_fraction and data.validation is None:
        raise InputError(
            f"data.validation_fraction {section.validation_fraction:g} of the {len(data.train)} rows of "
            f"{source_names(section.train)} holds out none: raise it, name a file in data.validation, or set it to 0"
        )
    return data


def fit_trees(data: PreparedData, model: PreTrainedModel, say: Say = _ignore) -> PreparedData:
    """Data whose branches (data/tree.py) are rows of their own where the model would mix them."""
    train = separated(data.train, model)
    validation = separated(data.validation, model) if data.validation else None
    if train is not data.train or validation is not data.validation:
        say(f"{type(model).__name__} mixes branches of a conversation: each answer gets a row of its own")
    return replace(data, train=train, validation=validation)


def refuse_foreign_tokens(data: PreparedData, model: PreTrainedModel, config: RunConfig) -> None:
    """InputError when a row has a token that the model has no embedding for."""
    size = vocabulary_size(model)
    for dataset in (data.train, data.validation):
        for example, row in zip(dataset.examples, dataset.rows, strict=True) if dataset else ():
            if max(example.ids) >= size:
                raise InputError(
                    f"{row.file}:{row.line}: the tokenizer makes token {max(example.ids)} of this row, and the model "
                    f"has {size} tokens: the tokenizer in {config.model.path} is not this model's"
                )


def make_plan(config: RunConfig, data: PreparedData) -> Plan:
    """Turn epochs into steps; a `micro_batch` that is auto is the whole batch until a memory plan says less."""
    training, per_epoch = config.training, batches_per_epoch(len(data.train), config.training.batch_size)
    return Plan(
        total_steps=training.max_steps or training.epochs * per_epoch,
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


def describe(data: PreparedData) -> str:
    """One sentence on what was read: of one file alone its rows, of more what each entry gave."""
    parts, first = [f"{told(data.sources)}; {len(data.train)} to train on"], data.sources[0]
    if len(data.sources) == 1 and first.is_plain:
        parts = [f"{first.path}: {listing(first.shapes)} rows, {len(data.train)} to train on"]
    if data.validation:
        aside = data.validation_sources
        is_plain = not aside or (len(aside) == 1 and aside[0].is_plain)
        parts.append(f"{len(data.validation)} held out" + ("" if is_plain else f" ({told(aside)})"))
    if data.truncated:
        parts.append(f"{data.truncated} truncated")
    if data.silent_turns:
        parts.append(f"{data.silent_turns} assistant turns without a word, not trained")
    for source in (*data.sources, *data.validation_sources):
        if source.others:
            parts.append(f"not read in {source.path}: {listing(source.others)}")
    if data.unused:
        parts.append(f"not used: {listing(data.unused)}")
    if data.rejected:
        first = data.rejected[0]
        parts.append(f"{len(data.rejected)} rejected (first: {first.file}:{first.line}: {first.reason})")
    return ", ".join(parts)


def _write_rejected(directory: RunDirectory, data: PreparedData) -> None:
    if data.rejected:
        lines = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in data.rejected)
        write_text(directory.path / "rejected.jsonl", lines)
