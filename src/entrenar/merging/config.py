"""mergekit's YAML, read strictly: which models, which layers of them, by which method."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from entrenar.core.config import Section, load_config, validate
from entrenar.core.documents import read_text
from entrenar.core.errors import InputError


def _without_torch(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _whole_numbers(value: Any) -> Any:
    """A range written as text."""
    if not isinstance(value, list | tuple):
        return value
    return [int(end) if isinstance(end, str) and end.strip().isdecimal() and len(end) < 10 else end for end in value]


TEMPLATE = """  merge_method: linear
  models:
  - {model: path/to/one, parameters: {weight: 0.5}}
  - {model: path/to/other, parameters: {weight: 0.5}}
  dtype: bfloat16"""
_MOST_BYTES = 1 << 24
_DOCUMENT = re.compile(r"^---(?=\s|$)", re.MULTILINE)

DtypeName = Annotated[Literal["float32", "float16", "bfloat16"], BeforeValidator(_without_torch)]
LayerRange = Annotated[tuple[int, int], BeforeValidator(_whole_numbers)]
Parameters = dict[str, Any]
"""Name → a scalar, a gradient over the layers (a list of numbers), or a list of {filter, value}."""


class ModelConfig(Section):
    """A whole model."""

    model: str
    parameters: Parameters = Field(default_factory=dict)


class SourceConfig(ModelConfig):
    """Some layers of a model: [first, end)."""

    layer_range: LayerRange = Field(strict=False)

    @model_validator(mode="after")
    def _is_a_range(self) -> "SourceConfig":
        first, end = self.layer_range
        if not 0 <= first < end:
            raise ValueError(f"layer_range must be [first, end) with 0 <= first < end, not [{first}, {end}]")
        return self


class SliceConfig(Section):
    """Layers of the result, merged from as many layers of every source."""

    sources: list[SourceConfig] = Field(min_length=1)
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ranges_are_of_one_length(self) -> "SliceConfig":
        lengths = {source.layer_range[1] - source.layer_range[0] for source in self.sources}
        if len(lengths) != 1:
            raise ValueError("the sources of a slice must have layer ranges of one length")
        return self


class ModuleConfig(Section):
    """The parts of a model when they are named one by one; a language model has one."""

    models: list[ModelConfig] | None = None
    slices: list[SliceConfig] | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_of(self) -> "ModuleConfig":
        if (self.models is None) == (self.slices is None):
            raise ValueError("a module has either models or slices")
        return self


class TokenizerConfig(Section):
    """mergekit's newer way to say `tokenizer_source`."""

    source: str = "union"
    tokens: Any = None
    pad_to_multiple_of: Any = None

    @model_validator(mode="after")
    def _is_the_source_alone(self) -> "TokenizerConfig":
        for name in ("tokens", "pad_to_multiple_of"):
            if getattr(self, name) is not None:
                raise ValueError(f"tokenizer.{name} is not read by this version: only tokenizer.source is, remove it")
        return self


class MergeConfig(Section):
    """A merge; see mergekit's documentation for the keys. `name` is nobody's but the reader's."""

    name: str | None = None
    merge_method: str
    models: list[ModelConfig] | None = None
    slices: list[SliceConfig] | None = None
    modules: dict[str, ModuleConfig] | None = None
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None

    @model_validator(mode="after")
    def _is_one_of(self) -> "MergeConfig":
        given = [name for name in ("models", "slices", "modules") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of models, slices and modules, not {' and '.join(given) or 'none'}")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("tokenizer and tokenizer_source say the same: give one of them")
        if self.modules is not None and len(self.modules) != 1:
            raise ValueError("modules has to have one entry: models of several modules are not merged by this version")
        return self

    @property
    def vocabulary(self) -> str | None:
        """Whose tokens the result has; None: embeddings have to fit as they are."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source

    @property
    def body(self) -> ModuleConfig:
        """Models or slices, wherever they stand."""
        if self.modules is not None:
            return next(iter(self.modules.values()))
        return ModuleConfig(models=self.models, slices=self.slices)


def read_merge_config(source: str | Path | dict[str, Any]) -> tuple[MergeConfig, str]:
    """The config in a YAML file, or in a dict, and its text.

    Raises:
        InputError: every problem with its line.
    """
    if isinstance(source, dict):
        _refuse_others(source, "merge")
        return validate(MergeConfig, source, "merge", {}), yaml.safe_dump(source, sort_keys=False)
    path = Path(source)
    if not os.path.lexists(path):
        raise InputError(f"merge config {path} does not exist: check the path; the least that it holds is\n{TEMPLATE}")
    text = read_text(path, "merge config", _MOST_BYTES)
    if len(_DOCUMENT.findall(text.strip().removeprefix("---"))) > 0:
        raise InputError(
            f"{path} holds several YAML documents (mergekit-multi's merges of merges): put each into a file of its own "
            "and merge them one after the other"
        )
    _refuse_others(dict.fromkeys(re.findall(r"^(\w+) *:", text, re.MULTILINE)), str(path))
    return load_config(MergeConfig, path), text


def _refuse_others(keys: Mapping[str, Any], source: str) -> None:
    """InputError for the config of another of mergekit's tools."""
    if "experts" in keys and "merge_method" not in keys:
        raise InputError(
            f"{source} is a config of mergekit-moe, which makes a mixture of experts of several models: that is no "
            "merge, and not done here"
        )
