"""PEFT adapter directory: `adapter_config.json` and `adapter_model.safetensors`, read strictly.

Keys are `base_model.model.<layer path>.lora_A.weight` (rank, d_in) and `.lora_B.weight` (d_out, rank). peft loads a
wrong prefix as an adapter without effect and only warns; here every key must be understood.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrenar.core.atomic import atomic_directory
from entrenar.core.errors import InputError, listing
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.safetensors import SafetensorsCheckpoint, read_metadata, write_file

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_BASE_KEY = "entrenar.base_format"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<layer>.+)\.lora_(?P<factor>[AB])\.weight")

# What an adapter may say beyond plain LoRA, and the only value that this version understands.
_PLAIN_ONLY: dict[str, Any] = {
    "use_dora": False, "use_rslora": False, "bias": "none", "fan_in_fan_out": False, "rank_pattern": {},
    "alpha_pattern": {}, "modules_to_save": None, "lora_bias": False, "layer_replication": None,
    "megatron_config": None, "trainable_token_indices": None, "target_parameters": None, "use_qalora": False,
    "alora_invocation_tokens": None, "arrow_config": None,
}  # fmt: skip
# Initialisations that change the base weights as well, so that the adapter alone means nothing on the original base.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class BaseFormat:
    """How the base was held while the adapter was trained; noted in the metadata of the adapter's file.

    A format of the registry, or `keep`: a GGUF's own blocks, which may be of several types.
    """

    format: str
    block_size: int
    double_quant: bool


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """A LoRA adapter as it stands on disk; `factors`: layer path → (A (rank, d_in), B (d_out, rank))."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str] | str
    base_model: str | None
    base_format: BaseFormat | None
    factors: dict[str, tuple[Tensor, Tensor]] = field(repr=False)


def write_adapter(directory: Path, adapter: PeftAdapter) -> None:
    """Write a new adapter directory, atomically; it must not exist."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base_model,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout,
        "target_modules": adapter.targets, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "inference_mode": True,
    }  # fmt: skip
    with atomic_directory(directory) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        note = {_BASE_KEY: json.dumps(asdict(adapter.base_format))} if adapter.base_format else {}
        write_factors(temporary / WEIGHTS_NAME, adapter.factors, note)


def write_factors(
    file: Path, factors: dict[str, tuple[Tensor, Tensor]], metadata: dict[str, str] | None = None
) -> None:
    """Write factors under PEFT's keys, as float32."""
    tensors = [
        LazyTensor(f"{_PREFIX}{layer}.lora_{letter}.weight", tuple(factor.shape), factor.clone)
        for layer, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    ]
    write_file(file, tensors, torch.float32, metadata)


def read_base_format(directory: Path) -> BaseFormat | None:
    """How the base was held when this adapter was trained, or None when its file does not say (peft's never does)."""
    note = read_metadata(_weights_file(directory)).get(_BASE_KEY)
    try:
        return BaseFormat(**json.loads(note)) if note else None
    except (ValueError, TypeError):
        raise InputError(
            f"{directory / WEIGHTS_NAME} has broken metadata {_BASE_KEY}: save the adapter again"
        ) from None


def read_adapter(directory: Path) -> PeftAdapter:
    """Read an adapter directory.

    Raises:
        InputError: a file missing or broken, a kind of adapter other than plain LoRA, or a key that is not understood.
    """
    config = _read_config(directory / CONFIG_NAME)
    return PeftAdapter(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        targets=config["target_modules"],
        base_model=config.get("base_model_name_or_path"),
        base_format=read_base_format(directory),
        factors=read_factors(_weights_file(directory)),
    )


def read_factors(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer path → (A, B) from a safetensors file with PEFT's keys; strict."""
    checkpoint = SafetensorsCheckpoint(file)
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key in checkpoint.names():
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
        else:
            found.setdefault(match["layer"], {})[match["factor"]] = checkpoint.read(key)
    if strange:
        raise InputError(
            f"{file} has keys that are not {_PREFIX}<layer>.lora_A|B.weight: {listing(sorted(strange), 3)}"
        )
    halves = [layer for layer, pair in found.items() if len(pair) != 2]
    if halves or not found:
        what = f"only one of lora_A and lora_B for {listing(halves, 3)}" if halves else "no tensors"
        raise InputError(f"{file} has {what}: save the adapter again")
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


def _weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS_NAME
    if not file.is_file():
        raise InputError(f"{file} does not exist: point to a PEFT adapter directory ({CONFIG_NAME}, {WEIGHTS_NAME})")
    return file


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} does not exist: point to a PEFT adapter directory ({CONFIG_NAME}, {WEIGHTS_NAME})")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in ("peft_type", "r", "lora_alpha", "target_modules") if key not in config]
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is not a JSON object: {error}") from None
    if missing:
        raise InputError(f"{file} lacks {listing(missing)}: it is not a LoRA adapter of PEFT")
    if config["peft_type"] != "LORA":
        raise InputError(f"{file} is a {config['peft_type']} adapter: only LORA is read")
    if not isinstance(config["r"], int) or config["r"] < 1:
        raise InputError(f"{file} has r = {config['r']!r}: the rank is a whole number from 1")
    for key, plain in _PLAIN_ONLY.items():
        if config.get(key, plain) not in (plain, None, False, {}, []):
            raise InputError(
                f"{file} has {key} = {config[key]!r}, which this version does not read: only plain LoRA is"
            )
    for key in ("lora_alpha", "lora_dropout"):
        if not isinstance(config.get(key, 0.0), int | float) or isinstance(config.get(key), bool):
            raise InputError(f"{file} has {key} = {config[key]!r}: it must be a number")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise InputError(
            f"{file} has init_lora_weights = {init!r}, which changed the base as well: convert it to plain LoRA"
        )
    return config
