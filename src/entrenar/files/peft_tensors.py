"""`adapter_model.safetensors` of PEFT: every key and every tensor is understood, or refused by name.

Keys are `base_model.model.<layer path>.lora_A.weight` (rank, d_in) and `.lora_B.weight` (d_out, rank); DoRA adds
`.lora_magnitude_vector` (d_out,); an embedding has `.lora_embedding_A` (rank, vocabulary) and `.lora_embedding_B`; a
parameter that is trained whole stands under its own name. peft loads a wrong prefix as an adapter without effect and
only warns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from entrenar.core.errors import InputError, listing
from entrenar.files.lazy_tensor import LazyTensor
from entrenar.files.safetensors import SafetensorsCheckpoint, write_file

_PREFIX = "base_model.model."
# The ends of a layer's keys; the sets in which they belong together. No other file spells out a word of PEFT's keys.
A_END, B_END, MAGNITUDE_END = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
PLAIN_ENDS = {A_END, B_END}
EMBEDDING_ENDS = ("lora_embedding_A", "lora_embedding_B")
_SUFFIXES = tuple(f".{end}" for end in (A_END, B_END, MAGNITUDE_END, *EMBEDDING_ENDS))
_TOGETHER = (PLAIN_ENDS, {*PLAIN_ENDS, MAGNITUDE_END}, {*EMBEDDING_ENDS})
WRAPPED = ".base_layer"  # the module that an adapted one is laid over
_BASE_BIAS, _BASE_WEIGHT = f"{WRAPPED}.bias", f"{WRAPPED}.weight"
_ROWS_LAYER = ".token_adapter"
ROWS_END = "token_adapter.trainable_tokens_delta"  # whole rows of chosen tokens, see lora/token_rows.py
# What peft's save_embedding_layers leaves of a module in modules_to_save: the copy once more, and the base's own.
_COPY, _ORIGINAL = ".modules_to_save.weight", ".original_module.weight"
# Embeddings and heads, whose base weights peft writes beside an adapter when the vocabulary has another size.
_EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings"}
_HEADS = ("lm_head", "embed_out")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Floats too, but nothing computes with them: read as float32, as peft copies them.
_WIDENED = (torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)

# Layer path → end of its key → tensor.
LayerTensors = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class AdapterTensors:
    """The tensors of an adapter.

    Attributes:
        layers: of the adapted layers.
        saved: parameter path → what is trained whole: modules_to_save and biases.
        base: parameter path → weights of the base that peft writes beside an adapted embedding or one that has grown;
            never written here.
    """

    layers: LayerTensors = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer path → (A (rank, d_in), B (d_out, rank)) of every linear layer."""
        return {name: (parts[A_END], parts[B_END]) for name, parts in self.layers.items() if parts.keys() >= PLAIN_ENDS}


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


def is_within(parameter: str, modules: Sequence[str]) -> bool:
    """Whether a parameter is of a module that `modules_to_save` names: by peft, one whose path ends with the word.

    Without a dot before it: `norm` names every `post_attention_layernorm` too.
    """
    steps = parameter.split(".")
    paths = [".".join(steps[:count]) for count in range(1, len(steps))]
    return any(path.endswith(module) for path in paths for module in modules)


def embedding_rows(shapes: Mapping[str, Sequence[int]]) -> int:
    """The most rows that an embedding's or a head's own weight has among tensors (name → shape); 0: there is none."""
    rows = 0
    for name, shape in shapes.items():
        for end in (_BASE_WEIGHT, _ORIGINAL, _COPY, ".weight"):
            if name.endswith(end):
                owner = name.removesuffix(end).removesuffix(_ROWS_LAYER).rpartition(".")[2]
                rows = max(rows, *shape[:1]) if owner in _EMBEDDINGS and shape else rows
                break
    return rows


def file_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by its key; only the header is read."""
    return {key: info.shape for key, info in SafetensorsCheckpoint(file).tensors.items()}


def read_tensors(file: Path, modules_to_save: Sequence[str] | None = None, bias: str = "all") -> AdapterTensors:
    """The tensors of a safetensors file with PEFT's keys; strict.

    Args:
        modules_to_save: modules whose parameters may be there too, by the ends of their paths; None: any.
        bias: `all` and `lora_only` allow biases.

    Raises:
        InputError: a broken file, a key that is not understood, half of a pair, a tensor that is not of finite floats,
            or factors that are no matrices.
    """
    checkpoint = SafetensorsCheckpoint(file)
    adapter, strange = AdapterTensors(), []
    for key in checkpoint.names():
        name = key.removeprefix(_PREFIX)
        end = next((end for end in _SUFFIXES if name.endswith(end)), None)
        if name == key or (end is not None and len(name) == len(end)):
            strange.append(key)
        elif end is not None:
            adapter.layers.setdefault(name.removesuffix(end), {})[end.removeprefix(".")] = _read(checkpoint, key)
        elif (place := _place(name, adapter, modules_to_save, bias)) is None:
            strange.append(key)
        else:
            _put(*place, _read(checkpoint, key), file)
    _drop_tied_head(adapter)
    _check_keys(file, adapter, strange)
    _check_shapes(file, adapter)
    return adapter


def _drop_tied_head(adapter: AdapterTensors) -> None:
    """Where it saves the embedding too, peft writes the trained rows of a tied head twice, the second time as the
    head's own."""
    layers = [name.removesuffix(f".{ROWS_END}") for name in adapter.saved if name.endswith(f".{ROWS_END}")]
    for head in [layer for layer in layers if layer.rpartition(".")[2] in _HEADS]:
        if any(_same_rows(adapter, head, layer) for layer in layers if layer != head):
            del adapter.saved[f"{head}.{ROWS_END}"], adapter.base[f"{head}.weight"]


def _same_rows(adapter: AdapterTensors, one: str, other: str) -> bool:
    base = [adapter.base.get(f"{layer}.weight") for layer in (one, other)]
    rows = [adapter.saved[f"{layer}.{ROWS_END}"] for layer in (one, other)]
    return base[0] is not None and base[1] is not None and torch.equal(base[0], base[1]) and torch.equal(*rows)


def _place(
    name: str, adapter: AdapterTensors, modules_to_save: Sequence[str] | None, bias: str
) -> tuple[dict[str, Tensor], str] | None:
    """Where a tensor that is no part of a layer's adapter belongs, and under which name; None: nowhere."""
    if name.endswith(f".{ROWS_END}"):
        return adapter.saved, name
    for end in (_BASE_WEIGHT, _ORIGINAL):
        if name.endswith(end):
            # An embedding of which only rows are trained stands below those rows, in its own layer.
            return adapter.base, f"{name.removesuffix(end).removesuffix(_ROWS_LAYER)}.weight"
    if name.endswith(_COPY):
        return adapter.saved, f"{name.removesuffix(_COPY)}.weight"
    if bias != "none" and name.rpartition(".")[2] == "bias":
        return adapter.saved, name.replace(_BASE_BIAS, ".bias")
    if modules_to_save is None or is_within(name, modules_to_save):
        return adapter.saved, name
    owner, _, leaf = name.rpartition(".")
    return (adapter.base, name) if leaf == "weight" and owner.rpartition(".")[2] in _EMBEDDINGS else None


def _put(where: dict[str, Tensor], name: str, tensor: Tensor, file: Path) -> None:
    if name in where and not torch.equal(where[name], tensor):
        raise InputError(f"{file} has {name} twice, with two values: save the adapter again")
    where[name] = tensor


def _read(checkpoint: SafetensorsCheckpoint, key: str) -> Tensor:
    stored = checkpoint.stored(key)
    where = f"{stored.file.path}: {key}"
    if stored.dtype not in (*_FLOATS, *_WIDENED):
        raise InputError(f"{where} is {stored.dtype}, and what is trained are floats: save the adapter again")
    tensor = checkpoint.read(key)
    tensor = tensor.float() if stored.dtype in _WIDENED else tensor
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{where} has values that are NaN or infinite: its training failed, take an earlier one")
    return tensor


def _check_keys(file: Path, adapter: AdapterTensors, strange: list[str]) -> None:
    if strange:
        raise InputError(
            f"{file} has keys that are not {_PREFIX}<layer>.lora_A|B.weight or another part of an adapter that its "
            f"config names: {listing(sorted(strange), 3)}"
        )
    stretched = [layer for layer, parts in adapter.layers.items() if parts.keys() > {*EMBEDDING_ENDS}]
    if stretched:
        raise InputError(f"{file} has DoRA over an embedding, {listing(stretched)}, which this version does not read")
    halves = [layer for layer, parts in adapter.layers.items() if parts.keys() not in _TOGETHER]
    if halves or not (adapter.layers or adapter.saved):
        what = f"only one of lora_A and lora_B for {listing(halves, 3)}" if halves else "no tensors"
        raise InputError(f"{file} has {what}: save the adapter again")


def _check_shapes(file: Path, adapter: AdapterTensors) -> None:
    """InputError for factors that are empty or no matrices, as those of a sharded training that nobody gathered."""
    for layer, parts in adapter.layers.items():
        for end, tensor in parts.items():
            wanted = 1 if end == MAGNITUDE_END else 2
            if tensor.dim() != wanted or not tensor.numel():
                raise InputError(
                    f"{file} has {layer}.{end} of shape {tuple(tensor.shape)}, where {wanted} dimensions are needed: "
                    "was it saved from a sharded training without gathering it? Save the adapter again"
                )
