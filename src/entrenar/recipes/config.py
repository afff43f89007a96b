"""The config of a training run. Every key has a type, a bound and a default; `entrenar init` writes it commented."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from entrenar.core.config import Section
from entrenar.data.row_options import RowOptions, TrainOn
from entrenar.data.sources import Sources
from entrenar.files.lora_options import Bias
from entrenar.lora.spec import LoraSpec
from entrenar.opening.compute import DEVICES

_MOST = 2**31 - 1  # of anything that is counted
Positive = Annotated[int, Field(ge=1, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # as numpy and transformers bound theirs
Fraction = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[Finite, Field(ge=0)]
AboveZero = Annotated[Finite, Field(gt=0)]
_LEAST_EPS = 1e-37  # below, float32 rounds it to nothing or nearly, and an update divides 0 by 0

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _read_memory(value: Any) -> Any:
    """`6GB`, `1.5 GiB` or a plain number → bytes."""
    if value in ("auto", "min"):
        return value
    match = (
        re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) *([a-z]*)", value.strip().lower())
        if isinstance(value, str)
        else None
    )
    count = round(Decimal(match[1]) * _UNITS.get(match[2], 0)) if match else value
    if type(count) is not int or not 1 <= count < 2**63:
        raise ValueError("allowed are auto, min, or bytes such as 6000000000 or 6GB")
    return count


def _read_date(value: Any) -> Any:
    """YAML reads a bare 2026-11-30 as a date."""
    if type(value) is date:
        return value.isoformat()
    try:
        valid = value is None or date.fromisoformat(value).isoformat() == value
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError("a date is written 2026-11-30")
    return value


def _read_device(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(DEVICES, value):
        raise ValueError("allowed are auto, cpu, cuda or cuda:N")
    return value


Memory = Annotated[Literal["auto", "min"] | int, BeforeValidator(_read_memory)]
Device = Annotated[str, BeforeValidator(_read_device)]
Date = Annotated[str | None, BeforeValidator(_read_date)]


class ModelSection(Section):
    """Which model, and how its base is held; `keep`, the default for a .gguf: in the file's own blocks.

    `quantize` may also be a mapping of the four keys that say how: `{format: nf4, search: true}`.
    """

    path: str
    quantize: Literal["nf4", "fp4", "int4", "int8", "none", "keep"] = "nf4"
    double_quant: bool = False
    block_size: Literal[16, 32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    search: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Device = "auto"

    @model_validator(mode="before")
    @classmethod
    def _spread_quantize(cls, values: Any) -> Any:
        """`quantize` as a mapping → the keys beside it."""
        if not isinstance(values, dict) or not isinstance(values.get("quantize"), dict):
            return values
        given = dict(values["quantize"])
        allowed = ("format", "double_quant", "block_size", "search")
        wrong = [key for key in given if key not in allowed or key in values]
        if wrong or "format" not in given:
            raise ValueError(f"quantize takes {', '.join(allowed)}, each once and the format always: got {list(given)}")
        named = given.pop("format")
        return {**values, **given, "quantize": named}

    @model_validator(mode="before")
    @classmethod
    def _keep_a_gguf(cls, values: Any) -> Any:
        if isinstance(values, dict) and "quantize" not in values and str(values.get("path", "")).endswith(".gguf"):
            return {**values, "quantize": "keep"}
        return values

    @model_validator(mode="after")
    def _keep_only_a_gguf(self) -> Self:
        if self.quantize == "keep" and not self.path.endswith(".gguf"):
            raise ValueError(f"quantize: keep holds a .gguf file's own blocks, and {self.path} is none: choose nf4")
        return self

    @model_validator(mode="after")
    def _search_needs_a_codebook(self) -> Self:
        if self.search and self.quantize not in ("nf4", "fp4"):
            raise ValueError(f"search is for nf4 and fp4, not for {self.quantize}: leave it out")
        return self


class DataSection(Section):
    """Which rows, and what becomes of them. `train`, `validation`: a file, a pattern, a directory, a hub dataset, or a
    list of such entries, each also with its weight or rows (data/sources.py). `packing` lays several rows into one of
    up to `max_length`, kept apart. `date`: what a chat template that writes the day's date writes; null: the day of the
    run's first start, which it keeps. `train_on`: every answer of a conversation, the last, or those marked by
    `weight: 1` or `train: true`; `columns`: our name of a column → the file's (`{messages: chat}`); `template`:
    variables for the chat template (`{enable_thinking: false}`), which a row's own `chat_template_kwargs` go before.
    """

    train: Sources
    validation: Sources | None = None
    validation_fraction: Fraction = 0.0
    max_length: Positive = 1024
    too_long: Literal["error", "truncate", "drop"] = "error"
    packing: bool = True
    date: Date = None
    train_on: TrainOn = "all"
    columns: dict[str, str] = Field(default_factory=dict)
    template: dict[str, Any] = Field(default_factory=dict)

    @property
    def row_options(self) -> RowOptions:
        """What every reader of the rows needs."""
        return RowOptions(self.columns, self.train_on, self.template)

    @model_validator(mode="after")
    def _options_of_the_template(self) -> Self:
        taken = {"messages", "tools", "documents", "add_generation_prompt"} & set(self.template)
        if taken:
            raise ValueError(
                f"template holds a chat template's own variables, and {', '.join(sorted(taken))} is given by the rows"
            )
        return self

    @model_validator(mode="after")
    def _one_validation_source(self) -> Self:
        if self.validation and self.validation_fraction:
            raise ValueError("validation and validation_fraction exclude each other: keep one")
        return self


class LoraSection(Section):
    """The adapter; see files/lora_options.py."""

    rank: Positive = 16
    alpha: NotNegative = 32.0
    dropout: Fraction = 0.0
    targets: str | list[str] = "all-linear"
    exclude: str | list[str] = Field(default_factory=list)
    rslora: bool = False
    dora: bool = False
    init: str = "default"
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[str, NotNegative] = Field(default_factory=dict)
    bias: Bias = "none"
    modules_to_save: list[str] = Field(default_factory=list)
    new_tokens: list[str] = Field(default_factory=list)

    def spec(self, token_indices: Mapping[str, Sequence[int]]) -> LoraSpec:
        """The same for lora/attach.py, the new tokens by the rows that are trained for them."""
        return LoraSpec(**{k: v for k, v in dict(self).items() if k != "new_tokens"}, token_indices=token_indices)


class OptimizerSection(Section):
    """AdamW and its schedule; `lora_plus_ratio`: learning rate of B as a multiple of `lr` (LoRA+), and then
    `lora_plus_embedding_lr` is that of both factors of adapted embeddings, peft's `loraplus_lr_embedding`."""

    lr: AboveZero = 2e-4
    lora_plus_ratio: AboveZero = 1.0
    lora_plus_embedding_lr: AboveZero = 1e-6
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 0
    weight_decay: NotNegative = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Annotated[Finite, Field(ge=_LEAST_EPS)] = 1e-8
    max_grad_norm: NotNegative = 1.0


class TrainingSection(Section):
    """How long, and in what portions; neither `micro_batch`, `memory` nor packing changes the mathematics.

    `batch_size` is global and counts rows of the data; `micro_batch` counts what is laid before the model at a time,
    rows of up to `data.max_length` tokens: memory grows with their product. `memory` is what the process may hold of
    its own, in bytes or as `6GB`: auto takes what the machine has free, min as little as goes. To stay within it,
    decoder layers compute again what they do not keep, and `micro_batch`, if auto, is smaller. `max_steps` is the
    number of updates, whatever `epochs` says.
    """

    epochs: Positive = 3
    max_steps: Positive | None = None
    batch_size: Positive = 16
    micro_batch: Literal["auto"] | Positive = "auto"
    memory: Memory = "auto"
    seed: Seed = 0


class EvalSection(Section):
    """Loss on the validation rows: every so many steps, or once an epoch; `patience` 0 never stops early."""

    every_steps: Positive | None = None
    patience: Count = 0


class CheckpointSection(Section):
    """Full checkpoints every so many steps (0: only when stopped); the newest `keep` stay."""

    every_steps: Count = 50
    keep: Positive = 2


class LogSection(Section):
    """What the run prints."""

    progress: bool = True


class RunConfig(Section):
    """The whole config file of `entrenar train`."""

    output: str
    model: ModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> Self:
        if self.eval.patience and not (self.data.validation or self.data.validation_fraction):
            raise ValueError("eval.patience needs validation rows: set data.validation or data.validation_fraction")
        return self
