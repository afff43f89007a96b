"""PEFT adapter directory: `adapter_config.json` and `adapter_model.safetensors`, read strictly.

Keys are `base_model.model.<layer path>.lora_A.weight` (rank, d_in) and `.lora_B.weight` (d_out, rank); DoRA adds
`.lora_magnitude_vector` (d_out,); an embedding has `.lora_embedding_A` (rank, vocabulary) and `.lora_embedding_B`; a
parameter that is trained whole stands under its own name. peft loads a wrong prefix as an adapter without effect and
only warns; here every key must be understood, and every field of the config.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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
# What an initialisation took out of the base's weights (lora/initial.py), under the same keys; peft has no use for it.
TAKEN_NAME = "entrenar_taken.safetensors"
_BASE_KEY = "entrenar.base_format"
_PREFIX = "base_model.model."
# The ends of a layer's keys; the sets in which they belong together.
_SUFFIXES = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".lora_embedding_A", ".lora_embedding_B")
PLAIN_ENDS = {"lora_A.weight", "lora_B.weight"}
_TOGETHER = (PLAIN_ENDS, {*PLAIN_ENDS, "lora_magnitude_vector"}, {"lora_embedding_A", "lora_embedding_B"})
_BASE_BIAS, _BASE_WEIGHT = ".base_layer.bias", ".base_layer.weight"
# Parameters that are adapted as such (peft's target_parameters), in the order in which peft wraps their module: the
# first is innermost. Here each counts as a layer of its own.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_ROWS = ".token_adapter.trainable_tokens_delta"  # of chosen tokens, see lora/token_rows.py
_EXPERTS, _WRAPPED = "experts", ".base_layer"

# What an adapter may be beyond what this version reads, and the value that says it is not.
_PLAIN_ONLY: dict[str, Any] = {
    "lora_bias": False, "layer_replication": None, "megatron_config": None,
    "use_qalora": False, "alora_invocation_tokens": None, "arrow_config": None,
    "velora_config": None, "monteclora_config": None, "use_bdlora": None, "kasa_config": None,
}  # fmt: skip
# Fields that are read, and those that say how the adapter was made or chosen, which its tensors say too.
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "use_rslora",
    "use_dora", "bias", "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights", "fan_in_fan_out",
    "ensure_weight_tying", "target_parameters", "trainable_token_indices",
}  # fmt: skip
_PASSED_OVER = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "exclude_modules", "layers_to_transform",
    "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "enable_lora",
}  # fmt: skip
# Initialisations that change the base weights as well, so that the adapter alone means nothing on the original base.
_CHANGES_BASE = ("olora", "corda", "lora_ga", "mica")
_STARTS = ("pissa", "loftq")
_BIASES = ("none", "all", "lora_only")

# Layer path → end of its key → tensor.
LayerTensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class BaseFormat:
    """How the base was held while the adapter was trained; noted in the metadata of the adapter's file.

    A format of the registry, or `keep`: a GGUF's own blocks, which may be of several types.
    """

    format: str
    block_size: int
    double_quant: bool
    search: bool = False


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter.

    Attributes:
        layers: of the adapted layers.
        saved: parameter path → what is trained whole: modules_to_save and biases.
        base: parameter path → weights of the base that peft writes beside an adapted embedding; never written here.
    """

    layers: LayerTensors = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer path → (A (rank, d_in), B (d_out, rank)) of every linear layer."""
        return {
            name: (parts["lora_A.weight"], parts["lora_B.weight"])
            for name, parts in self.layers.items()
            if parts.keys() >= PLAIN_ENDS
        }


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """A LoRA adapter as it stands on disk; the fields are those of peft's config, see lora/spec.py.

    `token_indices`: end of a module's name → tokens whose rows were trained. `target_parameters`: 3-D parameters of
    experts, by whole names or their ends; in `tensors` they are layers. `taken`: what the initialisation took out of
    the base, layer path → its factors; only of `pissa` and `loftq`.
    """

    rank: int
    alpha: float
    dropout: float
    targets: list[str] | str
    base_model: str | None
    base_format: BaseFormat | None
    rslora: bool = False
    dora: bool = False
    init: bool | str = True
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    keeps_ties: bool = False
    fan_in_fan_out: bool = False
    target_parameters: list[str] = field(default_factory=list)
    token_indices: dict[str, list[int]] = field(default_factory=dict)
    tensors: AdapterTensors = field(repr=False)
    taken: LayerTensors = field(repr=False, default_factory=dict)

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer path → (A, B) of every linear layer."""
        return self.tensors.factors

    @property
    def starts_with_change(self) -> bool:
        """Whether its initialisation changed the base, so that it is not for the original weights."""
        return bool(self.taken) or (isinstance(self.init, str) and self.init.startswith(_STARTS))

    @property
    def is_plain(self) -> bool:
        """Whether factors of linear layers are all there is: W + scale·B·A over the original base."""
        return self.factors.keys() == self.tensors.layers.keys() and not (
            self.dora or self.tensors.saved or self.starts_with_change or self.target_parameters
        )


def write_adapter(directory: Path, adapter: PeftAdapter, beside: Callable[[Path], object] = lambda _: None) -> None:
    """Write a new adapter directory, atomically; it must not exist. `beside` writes what else is to lie there."""
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base_model,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout,
        "target_modules": adapter.targets, "bias": adapter.bias, "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": adapter.init, "use_rslora": adapter.rslora, "use_dora": adapter.dora,
        "rank_pattern": adapter.rank_pattern, "alpha_pattern": adapter.alpha_pattern,
        "modules_to_save": adapter.modules_to_save or None, "ensure_weight_tying": adapter.keeps_ties,
        "inference_mode": True, "target_parameters": adapter.target_parameters or None,
        "trainable_token_indices": adapter.token_indices or None,
    }  # fmt: skip
    tensors = replace(adapter.tensors, layers=_wrapped(adapter.tensors.layers, adapter.target_parameters))
    with atomic_directory(directory) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        note = {_BASE_KEY: json.dumps(asdict(adapter.base_format))} if adapter.base_format else {}
        write_tensors(temporary / WEIGHTS_NAME, tensors, note)
        beside(temporary)
        if adapter.taken:
            write_tensors(temporary / TAKEN_NAME, AdapterTensors(adapter.taken))


def _is_named(layer: str, targets: Sequence[str]) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _wrapped(layers: LayerTensors, parameters: Sequence[str]) -> LayerTensors:
    """Layers that are parameters under peft's keys: those of their module, with a `base_layer` for each one around."""
    named: LayerTensors = {}
    for name, parts in layers.items():
        module, _, leaf = name.rpartition(".")
        if leaf in EXPERT_PARAMETERS and _is_named(name, parameters):
            around = EXPERT_PARAMETERS[EXPERT_PARAMETERS.index(leaf) + 1 :]
            name = module + _WRAPPED * sum(f"{module}.{other}" in layers for other in around)
        named[name] = parts
    return named


def _unwrapped(layers: LayerTensors, parameters: Sequence[str], source: Path) -> LayerTensors:
    """The reverse; which parameters of a module are meant, the targets say.

    Raises:
        InputError: a module has more or fewer pairs of factors than the targets name of it.
    """
    named: LayerTensors = {}
    for module in dict.fromkeys(name.removesuffix(_WRAPPED) for name in layers):
        holds = module.rpartition(".")[2] == _EXPERTS
        chosen = [leaf for leaf in EXPERT_PARAMETERS if holds and _is_named(f"{module}.{leaf}", parameters)]
        own = [name for name in (module + _WRAPPED, module) if name in layers]  # the innermost first
        if len(own) != max(len(chosen), 1) or module not in layers:
            count = f"{len(own)} pairs of factors at {module}"
            raise InputError(f"{source} has {count}, of which its target_parameters name {listing(chosen) or 'none'}")
        names = [f"{module}.{leaf}" for leaf in chosen] or [module]
        named |= {name: layers[where] for name, where in zip(names, own, strict=True)}
    return named


def write_tensors(file: Path, tensors: AdapterTensors, metadata: dict[str, str] | None = None) -> None:
    """Write an adapter's tensors under PEFT's keys, as float32."""
    named = {f"{layer}.{end}": tensor for layer, parts in tensors.layers.items() for end, tensor in parts.items()}
    named |= {_file_name(name, tensors.layers): tensor for name, tensor in tensors.saved.items()}
    lazy = [LazyTensor(f"{_PREFIX}{name}", tuple(tensor.shape), tensor.clone) for name, tensor in named.items()]
    write_file(file, lazy, torch.float32, metadata)


def _file_name(parameter: str, layers: Mapping[str, object]) -> str:
    """A bias of an adapted layer belongs to peft's `base_layer`."""
    owner, _, leaf = parameter.rpartition(".")
    return f"{owner}{_BASE_BIAS}" if leaf == "bias" and owner in layers else parameter


def read_base_format(directory: Path) -> BaseFormat | None:
    """How the base was held when this adapter was trained, or None when its file does not say (peft's never does)."""
    note = read_metadata(_weights_file(directory)).get(_BASE_KEY)
    try:
        return BaseFormat(**json.loads(note)) if note else None
    except (ValueError, TypeError):
        raise InputError(
            f"{directory / WEIGHTS_NAME} has broken metadata {_BASE_KEY}: save the adapter again"
        ) from None


def largest_token(directory: Path) -> int:
    """The largest token that an adapter has a row for; −1 if it has none, as most."""
    indices = _token_indices(_read_config(directory / CONFIG_NAME).get("trainable_token_indices"))
    return max((max(tokens) for tokens in indices.values()), default=-1)


def read_adapter(directory: Path) -> PeftAdapter:
    """Read an adapter directory.

    Raises:
        InputError: a file missing or broken, a kind of adapter that is not read, or a field or key that is not
            understood.
    """
    config = _read_config(directory / CONFIG_NAME)
    saved = list(config.get("modules_to_save") or [])
    keeps_ties = bool(config.get("ensure_weight_tying"))  # then what is tied to a saved module is there too
    file, parameters = _weights_file(directory), list(config.get("target_parameters") or [])
    tensors = read_tensors(file, None if keeps_ties else saved, config.get("bias") or "none")
    tensors = replace(tensors, layers=_unwrapped(tensors.layers, parameters, file))
    _check_kinds(directory, tensors, dora=bool(config.get("use_dora")))
    init = config.get("init_lora_weights", True)
    return PeftAdapter(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        dropout=float(config.get("lora_dropout", 0.0)),
        targets=config["target_modules"],
        base_model=config.get("base_model_name_or_path"),
        base_format=read_base_format(directory),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        init=init,
        bias=config.get("bias") or "none",
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
        modules_to_save=saved,
        keeps_ties=keeps_ties,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        target_parameters=parameters,
        token_indices=_token_indices(config.get("trainable_token_indices")),
        tensors=tensors,
        taken=_read_taken(directory, init),
    )


def _token_indices(given: Any) -> dict[str, list[int]]:
    """peft takes a list for the embedding alone."""
    named = given if isinstance(given, dict) else {"embed_tokens": given}
    return {name: list(tokens) for name, tokens in named.items() if tokens}


def _read_taken(directory: Path, init: bool | str) -> LayerTensors:
    """What a start took out of the base; peft itself makes pissa's again, and writes none for loftq."""
    if (directory / TAKEN_NAME).is_file():
        return read_tensors(directory / TAKEN_NAME).layers
    if isinstance(init, str) and init.startswith("loftq"):
        raise InputError(
            f"{directory} was started with loftq, which changed the base's weights, and holds no {TAKEN_NAME} that "
            "says how: save it from peft as plain LoRA over a base that was saved with it"
        )
    return {}


def read_tensors(file: Path, modules_to_save: list[str] | None = None, bias: str = "all") -> AdapterTensors:
    """The tensors of a safetensors file with PEFT's keys; strict.

    Args:
        modules_to_save: suffixes of modules whose parameters may be there too; None: any.
        bias: `all` and `lora_only` allow biases.
    """
    checkpoint = SafetensorsCheckpoint(file)
    found, strange = AdapterTensors(), []
    for key in checkpoint.names():
        name = key.removeprefix(_PREFIX)
        end = next((end for end in _SUFFIXES if name.endswith(end)), None)
        if name == key or (end is not None and len(name) == len(end)):
            strange.append(key)
        elif end is not None:
            found.layers.setdefault(name.removesuffix(end), {})[end.removeprefix(".")] = checkpoint.read(key)
        elif name.endswith(_ROWS):
            found.saved[name] = checkpoint.read(key)
        elif name.endswith(_BASE_WEIGHT):
            found.base[f"{name.removesuffix(_BASE_WEIGHT)}.weight"] = checkpoint.read(key)
        elif bias != "none" and name.rpartition(".")[2] == "bias":
            found.saved[name.replace(_BASE_BIAS, ".bias")] = checkpoint.read(key)
        elif modules_to_save is None or any(f".{module}." in f".{name}" for module in modules_to_save):
            found.saved[name] = checkpoint.read(key)
        else:
            strange.append(key)
    _check_keys(file, found, strange)
    return found


def _check_keys(file: Path, found: AdapterTensors, strange: list[str]) -> None:
    if strange:
        raise InputError(
            f"{file} has keys that are not {_PREFIX}<layer>.lora_A|B.weight or another part of an adapter that its "
            f"config names: {listing(sorted(strange), 3)}"
        )
    halves = [layer for layer, parts in found.layers.items() if parts.keys() not in _TOGETHER]
    if halves or not (found.layers or found.saved):
        what = f"only one of lora_A and lora_B for {listing(halves, 3)}" if halves else "no tensors"
        raise InputError(f"{file} has {what}: save the adapter again")


def _check_kinds(directory: Path, tensors: AdapterTensors, *, dora: bool) -> None:
    """InputError unless each linear layer has a magnitude exactly when the config says DoRA."""
    for layer, parts in tensors.layers.items():
        if "lora_A.weight" in parts and ("lora_magnitude_vector" in parts) is not dora:
            raise InputError(
                f"{directory} has use_dora = {dora}, but {layer} has {'no' if dora else 'a'} "
                "lora_magnitude_vector: save the adapter again"
            )


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
    unknown = sorted(config.keys() - _READ - _PASSED_OVER - _PLAIN_ONLY.keys())
    if unknown:
        raise InputError(f"{file} has {listing(unknown)}, which this version does not know: what it means is not clear")
    for key, plain in _PLAIN_ONLY.items():
        if config.get(key, plain) not in (plain, None, False, {}, []):
            raise InputError(f"{file} has {key} = {config[key]!r}, which this version does not read")
    if (config.get("bias") or "none") not in _BIASES:
        raise InputError(f"{file} has bias = {config['bias']!r}: it is one of {', '.join(_BIASES)}")
    for key, kind in (
        ("rank_pattern", dict),
        ("alpha_pattern", dict),
        ("modules_to_save", list),
        ("target_parameters", list),
    ):
        if not isinstance(config.get(key) or kind(), kind):
            raise InputError(f"{file} has {key} = {config[key]!r}: it must be a {kind.__name__}")
    for key in ("lora_alpha", "lora_dropout"):
        if not isinstance(config.get(key, 0.0), int | float) or isinstance(config.get(key), bool):
            raise InputError(f"{file} has {key} = {config[key]!r}: it must be a number")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        raise InputError(
            f"{file} has init_lora_weights = {init!r}, which changed the base as well: convert it to plain LoRA"
        )
    return config
