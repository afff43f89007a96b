"""PEFT adapter directory: `adapter_config.json` (peft_config.py) and `adapter_model.safetensors` (peft_tensors.py).

Both are read strictly: every field must be understood, and every key.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from entrenar.core.atomic import atomic_directory
from entrenar.core.documents import parse_json
from entrenar.core.errors import InputError, listing
from entrenar.files.lora_options import LoraOptions
from entrenar.files.peft_config import CHANGES_BASE, CONFIG_NAME, read_config, written_config
from entrenar.files.peft_tensors import (
    A_END,
    MAGNITUDE_END,
    PLAIN_ENDS,
    WRAPPED,
    AdapterTensors,
    LayerTensors,
    embedding_rows,
    file_shapes,
    read_tensors,
    write_tensors,
)
from entrenar.files.safetensors import read_metadata

__all__ = ["CONFIG_NAME", "PLAIN_ENDS", "AdapterTensors", "LayerTensors", "read_tensors", "write_tensors"]
WEIGHTS_NAME = "adapter_model.safetensors"
# What an initialisation took out of the base's weights (lora/initial.py), under the same keys; peft has no use for it.
TAKEN_NAME = "entrenar_taken.safetensors"
_BASE_KEY = "entrenar.base_format"
# Parameters that are adapted as such (peft's target_parameters), in the order in which peft wraps their module: the
# first is innermost. Here each counts as a layer of its own.
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_EXPERTS = "experts"


@dataclass(frozen=True, kw_only=True)
class BaseFormat:
    """How the base was held while the adapter was trained; noted in the metadata of the adapter's file.

    A format of the registry, or `keep`: a GGUF's own blocks, which may be of several types.
    """

    format: str
    block_size: int
    double_quant: bool
    search: bool = False


@dataclass(frozen=True, kw_only=True)
class PeftAdapter(LoraOptions):
    """A LoRA adapter as it stands on disk: its options, its tensors, and what peft's config says beside.

    Attributes:
        base_format: how the base was held; None: it is not said.
        init: how the factors started, in peft's words.
        fan_in_fan_out: the adapted layers keep their weights as (d_in, d_out).
        target_parameters: 3-D parameters of experts, by whole names or their ends; in `tensors` they are layers.
        taken: what the initialisation took out of the base, layer path → its factors; only of `pissa` and `loftq`.
    """

    base_model: str | None
    base_format: BaseFormat | None
    init: bool | str = True
    fan_in_fan_out: bool = False
    target_parameters: list[str] = field(default_factory=list)
    tensors: AdapterTensors = field(repr=False)
    taken: LayerTensors = field(repr=False, default_factory=dict)

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer path → (A, B) of every linear layer."""
        return self.tensors.factors

    @property
    def starts_with_change(self) -> bool:
        """Whether its initialisation changed the base, so that it is not for the original weights."""
        return bool(self.taken) or (isinstance(self.init, str) and self.init.startswith(CHANGES_BASE))

    @property
    def is_plain(self) -> bool:
        """Whether factors of linear layers are all there is: W + scale·B·A over the original base."""
        return self.factors.keys() == self.tensors.layers.keys() and not (
            self.dora or self.tensors.saved or self.starts_with_change or self.target_parameters
        )

    @property
    def needs_rows(self) -> int:
        """How many rows an embedding or head needs at least for what the adapter has of it."""
        whole = {name: tensor.shape for name, tensor in (self.tensors.saved | self.tensors.base).items()}
        return max(1 + _largest(self.token_indices), embedding_rows(whole))


def write_adapter(directory: Path, adapter: PeftAdapter, beside: Callable[[Path], object] = lambda _: None) -> None:
    """Write a new adapter directory, atomically; it must not exist. `beside` writes what else is to lie there."""
    tensors = replace(adapter.tensors, layers=_wrapped(adapter.tensors.layers, adapter.target_parameters))
    with atomic_directory(directory) as temporary:
        (temporary / CONFIG_NAME).write_text(json.dumps(written_config(adapter), indent=2) + "\n", encoding="utf-8")
        note = {_BASE_KEY: json.dumps(asdict(adapter.base_format))} if adapter.base_format else {}
        write_tensors(temporary / WEIGHTS_NAME, tensors, note)
        beside(temporary)
        if adapter.taken:
            write_tensors(temporary / TAKEN_NAME, AdapterTensors(adapter.taken))


def _is_named(layer: str, targets: Sequence[str]) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _is_of(target: str, module: str) -> bool:
    """Whether a name of target_parameters can be that of a parameter of the module."""
    owner, _, leaf = target.rpartition(".")
    return bool(leaf) and _is_named(module, [owner] if owner else [])


def _wrapped(layers: LayerTensors, parameters: Sequence[str]) -> LayerTensors:
    """Layers that are parameters under peft's keys: those of their module, with a `base_layer` for each one around."""
    named: LayerTensors = {}
    for name, parts in layers.items():
        module, _, leaf = name.rpartition(".")
        if leaf in EXPERT_PARAMETERS and _is_named(name, parameters):
            around = EXPERT_PARAMETERS[EXPERT_PARAMETERS.index(leaf) + 1 :]
            name = module + WRAPPED * sum(f"{module}.{other}" in layers for other in around)
        named[name] = parts
    return named


def _unwrapped(layers: LayerTensors, parameters: Sequence[str], source: Path) -> LayerTensors:
    """The reverse; which parameters of a module are meant, the targets say.

    Raises:
        InputError: a module has more or fewer pairs of factors than the targets name of it, or is no mixture's experts.
    """
    named: LayerTensors = {}
    for module in dict.fromkeys(name.removesuffix(WRAPPED) for name in layers):
        holds = module.rpartition(".")[2] == _EXPERTS
        chosen = [leaf for leaf in EXPERT_PARAMETERS if holds and _is_named(f"{module}.{leaf}", parameters)]
        others = [target for target in parameters if not chosen and _is_of(target, module)]
        if others:
            raise InputError(
                f"{source} adapts {listing(others)} as a parameter (target_parameters), which is read for the "
                f"{' and '.join(EXPERT_PARAMETERS)} of a mixture's experts alone: train {module} as a layer "
                "(target_modules)"
            )
        pairs = [name for name in (module + WRAPPED, module) if name in layers]  # the innermost first
        if len(pairs) != max(len(chosen), 1) or module not in layers:
            count = f"{len(pairs)} pairs of factors at {module}"
            raise InputError(f"{source} has {count}, of which its target_parameters name {listing(chosen) or 'none'}")
        names = [f"{module}.{leaf}" for leaf in chosen] or [module]
        named |= {name: layers[where] for name, where in zip(names, pairs, strict=True)}
    return named


def read_base_format(directory: Path) -> BaseFormat | None:
    """How the base was held when this adapter was trained, or None when its file does not say (peft's never does)."""
    note = read_metadata(_weights_file(directory)).get(_BASE_KEY)
    try:
        return parse_json(note, _BASE_KEY, BaseFormat) if note else None
    except InputError as error:
        raise InputError(
            f"{directory / WEIGHTS_NAME} has broken metadata {error.args[0]}: save the adapter again"
        ) from None


def largest_token(directory: Path) -> int:
    """The largest token that an adapter has a row of its own for; −1 if it has none, as most."""
    return _largest(read_config(directory / CONFIG_NAME).token_indices)


def whole_rows(directory: Path) -> int:
    """The most rows that an embedding or a head in an adapter's file has; 0: there is none."""
    return embedding_rows(file_shapes(_weights_file(directory)))


def _largest(indices: Mapping[str, Sequence[int]]) -> int:
    return max((token for tokens in indices.values() for token in tokens), default=-1)


def read_adapter(directory: Path) -> PeftAdapter:
    """Read an adapter directory.

    Raises:
        InputError: a file missing or broken, a kind of adapter that is not read, or a field or key that is not
            understood.
    """
    config, file = read_config(directory / CONFIG_NAME), _weights_file(directory)
    options = config.options()
    # What is tied to a saved module is there too.
    tensors = read_tensors(file, None if options["keeps_ties"] else options["modules_to_save"], options["bias"])
    tensors = replace(tensors, layers=_unwrapped(tensors.layers, options["target_parameters"], file))
    _check_kinds(directory, tensors, dora=options["dora"])
    return PeftAdapter(
        **options, base_format=read_base_format(directory), tensors=tensors,
        taken=_read_taken(directory, options["init"]),
    )  # fmt: skip


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


def _check_kinds(directory: Path, tensors: AdapterTensors, *, dora: bool) -> None:
    """InputError unless each linear layer has a magnitude exactly when the config says DoRA."""
    for layer, parts in tensors.layers.items():
        if A_END in parts and (MAGNITUDE_END in parts) is not dora:
            raise InputError(
                f"{directory} has use_dora = {dora}, but {layer} has {'no' if dora else 'a'} "
                "lora_magnitude_vector: save the adapter again"
            )


def _weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS_NAME
    if not file.is_file():
        others = [name for name in ("adapter_model.bin", "adapters.safetensors") if (directory / name).is_file()]
        if others:
            raise InputError(
                f"{directory} holds {others[0]}, and adapters are read from {WEIGHTS_NAME} as PEFT writes it (never "
                "from pickles): load it in the tool that wrote it and save it as PEFT's safetensors"
            )
        raise InputError(f"{file} does not exist: point to a PEFT adapter directory ({CONFIG_NAME}, {WEIGHTS_NAME})")
    return file
