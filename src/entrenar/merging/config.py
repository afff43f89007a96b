"""mergekit's YAML, read strictly: which models, which layers of them, by which method."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from entrenar.core.config import Section, load_config
from entrenar.core.errors import InputError

DtypeName = Literal["float32", "float16", "bfloat16"]
Parameters = dict[str, Any]
"""Name → a scalar, a gradient over the layers (a list of numbers), or a list of {filter, value}."""


class ModelConfig(Section):
    """A whole model."""

    model: str
    parameters: Parameters = Field(default_factory=dict)


class SourceConfig(ModelConfig):
    """Some layers of a model: [first, end)."""

    layer_range: tuple[int, int] = Field(strict=False)

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


class MergeConfig(Section):
    """A merge; see mergekit's documentation for the keys."""

    merge_method: str
    models: list[ModelConfig] | None = None
    slices: list[SliceConfig] | None = None
    modules: dict[str, ModuleConfig] | None = None
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None

    @model_validator(mode="after")
    def _is_one_of(self) -> "MergeConfig":
        given = [name for name in ("models", "slices", "modules") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of models, slices and modules, not {' and '.join(given) or 'none'}")
        if self.modules is not None and len(self.modules) != 1:
            raise ValueError("modules has to have one entry: models of several modules are not merged by this version")
        return self

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
        from entrenar.core.config import validate

        return validate(MergeConfig, source, "merge", {}), yaml.safe_dump(source, sort_keys=False)
    config = load_config(MergeConfig, Path(source))
    try:
        return config, Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config file {source} cannot be read: {error}") from None
