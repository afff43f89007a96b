"""`adapter_config.json` of PEFT: every field that is read has a checked type, every other one must say nothing.

A field that this version does not know is passed over where its value says that it is not used (null, false, empty):
each release of peft writes its new fields at such values. One that says something is refused by name.
"""

from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from entrenar.core.documents import JsonObject, parse_json, read_bytes
from entrenar.core.errors import InputError, listing
from entrenar.files.lora_options import Bias

CONFIG_NAME = "adapter_config.json"
_MOST = 2**31 - 1

Rank = Annotated[int, Field(ge=1, le=_MOST)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[int, Field(ge=0, le=_MOST)]


def _named(name: str, null: Any = None, *, empty: bool = False) -> dict[str, Any]:
    """The attribute of `PeftAdapter` that a field of PEFT's is.

    Args:
        null: what a null stands for. empty: an empty value is one too, and is written as null.
    """
    return {"name": name, "null": null, "empty": empty}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields that are read and written, in their order in a file: PEFT's name, its type, and our name for it."""

    base_model_name_or_path: str | None = field(default=None, metadata=_named("base_model"))
    r: Rank = field(metadata=_named("rank"))
    lora_alpha: Number = field(metadata=_named("alpha"))
    lora_dropout: Share | None = field(default=None, metadata=_named("dropout", 0.0))
    target_modules: str | list[str] | None = field(metadata=_named("targets", []))
    bias: Bias | None = field(default=None, metadata=_named("bias", "none"))
    fan_in_fan_out: bool | None = field(default=None, metadata=_named("fan_in_fan_out", False))
    init_lora_weights: bool | str | None = field(default=None, metadata=_named("init", True))
    use_rslora: bool | None = field(default=None, metadata=_named("rslora", False))
    use_dora: bool | None = field(default=None, metadata=_named("dora", False))
    rank_pattern: dict[str, Rank] | None = field(default=None, metadata=_named("rank_pattern", {}))
    alpha_pattern: dict[str, Number] | None = field(default=None, metadata=_named("alpha_pattern", {}))
    modules_to_save: list[str] | None = field(default=None, metadata=_named("modules_to_save", [], empty=True))
    ensure_weight_tying: bool | None = field(default=None, metadata=_named("keeps_ties", False))
    inference_mode: Any = None  # how peft would open it: no option of the adapter, and always true here
    target_parameters: list[str] | None = field(default=None, metadata=_named("target_parameters", [], empty=True))
    trainable_token_indices: list[Place] | dict[str, list[Place]] | None = field(
        default=None, metadata=_named("token_indices", {}, empty=True)
    )
    exclude_modules: str | list[str] | None = field(default=None, metadata=_named("exclude", [], empty=True))
    layers_to_transform: Place | list[Place] | None = field(default=None, metadata=_named("layers"))
    layers_pattern: str | list[str] | None = field(default=None, metadata=_named("layers_pattern", empty=True))

    @property
    def token_indices(self) -> dict[str, list[int]]:
        """End of a module's name → tokens; a list is for the model's embedding, whatever that is called: ""."""
        given = self.trainable_token_indices
        named = given if isinstance(given, dict) else {"": given or []}
        return {name: tokens for name, tokens in named.items() if tokens}

    def options(self) -> dict[str, Any]:
        """The fields under our names, what stands for nothing replaced by what it means."""
        read: dict[str, Any] = {}
        for option in _OPTIONS:
            value, null = getattr(self, option.name), option.metadata["null"]
            is_null = not value if option.metadata["empty"] else value is None
            read[option.metadata["name"]] = copy(null) if is_null else value
        return read | {"token_indices": self.token_indices}


_OPTIONS = [option for option in fields(AdapterConfig) if option.metadata]


def written_config(adapter: object) -> JsonObject:
    """What `adapter_config.json` says of a `PeftAdapter`."""
    values: JsonObject = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    values |= dict.fromkeys((option.name for option in fields(AdapterConfig)), True)  # their order
    for option in _OPTIONS:
        value = getattr(adapter, option.metadata["name"])
        values[option.name] = (value or None) if option.metadata["empty"] else value
    indices = values["trainable_token_indices"] or {}
    return values | {"trainable_token_indices": indices.get("") or indices or None}


# Fields that say how the adapter was made, chosen or run, which its tensors say too.
_PASSED_OVER = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "revision", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "enable_lora",
}  # fmt: skip
# What an adapter may be beyond what this version reads.
_NOT_READ = {
    "lora_bias", "layer_replication", "megatron_config", "use_qalora", "alora_invocation_tokens", "arrow_config",
    "velora_config", "monteclora_config", "use_bdlora", "kasa_config",
}  # fmt: skip
# Initialisations that change the base weights as well, so that the adapter alone means nothing on the original base:
# for these the change can be made again (lora/initial.py), for those it cannot.
CHANGES_BASE = ("pissa", "loftq")
_CHANGES_BASE_FOR_GOOD = ("olora", "corda", "lora_ga", "mica")
_WANTED = ("peft_type", "r", "lora_alpha", "target_modules")


def read_config(file: Path) -> AdapterConfig:
    """The config of a LoRA adapter.

    Raises:
        InputError: no such file, not a LoRA adapter, a value of another type than its key has, or a field that says
            something which this version does not read or know.
    """
    if not file.exists():
        raise InputError(f"{file} does not exist: point to a PEFT adapter directory (with {CONFIG_NAME})")
    text, source = read_bytes(file, "adapter config").removeprefix(b"\xef\xbb\xbf"), f"adapter config {file}"
    values = parse_json(text, source, JsonObject)
    missing = [key for key in _WANTED if key not in values]
    if missing:
        raise InputError(f"{file} lacks {listing(missing)}: it is not a LoRA adapter of PEFT")
    kind = values["peft_type"]
    if kind != "LORA":
        raise InputError(f"{file} is a {_shown(kind)} adapter: only LORA is read")
    _check_fields(file, values)
    config = parse_json(text, source, AdapterConfig)
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(_CHANGES_BASE_FOR_GOOD):
        raise InputError(
            f"{file} has init_lora_weights = {init!r}, which changed the base as well: convert it to plain LoRA"
        )
    if config.target_modules is None and not config.target_parameters:
        raise InputError(f"{file} has target_modules = null and no target_parameters: it names nothing that it adapts")
    return config


def _check_fields(file: Path, values: JsonObject) -> None:
    """InputError for a field that says something which is not read, or that is not known."""
    used = [key for key, value in values.items() if not _says_nothing(value)]
    known = {field.name for field in fields(AdapterConfig)}
    for key in used:
        if key in _NOT_READ:
            raise InputError(f"{file} has {key} = {_shown(values[key])}, which this version does not read")
    unknown = sorted(set(used) - known - _PASSED_OVER)
    if unknown:
        raise InputError(
            f"{file} has {listing([_shown(key) for key in unknown], 5)}, which this version does not know: what it "
            "means is not clear"
        )


def _says_nothing(value: Any) -> bool:
    """Whether a field's value is that of a field which is not used: null, false, or empty all the way down."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is not None:
        return all(part is None or part is False or part in ("", [], {}) for part in parts)
    return value is None or value is False or value == ""


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
