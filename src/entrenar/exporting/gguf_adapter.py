"""Write an adapter as the LoRA GGUF that llama.cpp applies with `--lora` (its convert_lora_to_gguf.py).

`<tensor>.lora_a` (rank, in) and `.lora_b` (out, rank), float32. The runtime's scale is alpha / rank with one alpha for
the file and each tensor's own rank, so that a layer whose scale is another has the quotient in its B.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import gguf
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from entrenar.core.atomic import atomic_file, refuse_existing
from entrenar.core.errors import InputError, listing
from entrenar.files.peft import PLAIN_ENDS, PeftAdapter, read_adapter
from entrenar.gguf.config import check_exportable
from entrenar.gguf.families import Family, family_of
from entrenar.gguf.writer import GGUFTensor, write_gguf_file
from entrenar.lora.adapter_io import load_adapter
from entrenar.lora.attach import adapted_layers
from entrenar.lora.low_rank import AdapterLayer
from entrenar.opening.build import build_on_meta
from entrenar.opening.match import is_tied, match_tensors
from entrenar.opening.source import ModelSource

_INSTEAD = "fuse it into the model instead (--to gguf)"


def export_gguf_adapter(source: ModelSource, adapter: str, path: Path) -> None:
    """Write the PEFT directory `adapter`, trained over the model of `source`, as `path`, which must not exist.

    Raises:
        InputError: an adapter that does not fit the model, or that a GGUF adapter cannot carry: layers it has no name
            for, parameters beside A and B, a tied output head.
    """
    refuse_existing(path)
    check_exportable(source.config)
    read = read_adapter(Path(adapter))
    _refuse_more(read, adapter)
    model = _hollow(source, read.tensors.base)
    load_adapter(model, adapter)
    if model.config.get_text_config().vocab_size > source.config.get_text_config().vocab_size:
        raise InputError(f"{adapter} brings rows for new tokens, which a GGUF adapter cannot carry: {_INSTEAD}")
    layers = dict(adapted_layers(model))
    family = family_of(source.config)
    first = next(iter(layers.values()))
    alpha = first.scale * first.rank
    keys = {
        "general.architecture": family.architecture, "general.type": gguf.GGUFType.ADAPTER,
        "general.name": Path(adapter).name, gguf.Keys.Adapter.TYPE: "lora", gguf.Keys.Adapter.LORA_ALPHA: float(alpha),
    }  # fmt: skip
    tensors = [
        GGUFTensor(
            f"{_gguf_name(name, model, family)}.lora_{suffix}", tuple(factor.shape), "f32", partial(_bytes, factor)
        )
        for name, layer in layers.items()
        for suffix, factor in zip("ab", _factors(name, layer, alpha, source.config), strict=True)
    ]
    with atomic_file(path) as temporary:
        write_gguf_file(temporary, keys, tensors)


def _bytes(factor: Tensor) -> Tensor:
    return factor.contiguous().view(torch.uint8)


def modelfile(base: str, adapter: Path, stops: Sequence[str]) -> str:
    """An Ollama Modelfile that runs `adapter`, a file beside it, over the model `base`, and stops at the texts `stops`;
    lines of a name are refused."""
    places = str(Path(base).resolve()), f"./{adapter.name}"
    for place in places:
        if not place.isprintable():
            raise InputError(f"a Modelfile has no place for a name with control characters, {place!r}: rename it")
    parameters = [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops if stop.isprintable()]
    return "\n".join([f"FROM {places[0]}", f"ADAPTER {places[1]}", *parameters, ""])


def _hollow(source: ModelSource, base: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model with linear layers that adapters attach to, and without weights: one zero stands for each matrix.

    But those of which the adapter brings the base's own, as peft writes them beside an adapted head or embedding, are
    read, in the dtype of the adapter's: whether they are this model's is checked.
    """
    model = build_on_meta(source, torch.float32)
    stored = match_tensors(model, source) if base else {}
    embedding = next((name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight), "")
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if weight in base:
            values = stored[weight if weight in stored else embedding].read().to(base[weight].dtype)
            module.weight = nn.Parameter(values, requires_grad=False)
        elif isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.zeros(()).expand(module.weight.shape), requires_grad=False)
    return model


def _refuse_more(adapter: PeftAdapter, directory: str) -> None:
    """InputError for anything but W + scale·B·A of linear layers over the model's own weights."""
    if adapter.starts_with_change:
        raise InputError(
            f"{directory} was started with {adapter.init}, which changed the base, and a GGUF adapter is applied to "
            f"the original: save it with save_adapter(model, directory, plain=True), or {_INSTEAD}"
        )
    if adapter.is_plain:
        return
    more = [f"{name}.{end}" for name, parts in adapter.tensors.layers.items() for end in parts.keys() - PLAIN_ENDS]
    raise InputError(
        f"{directory} has trained parameters beside A and B of linear layers, which a GGUF adapter cannot carry: "
        f"{listing(sorted([*more, *adapter.tensors.saved]), 3)}; {_INSTEAD}"
    )


def _gguf_name(layer: str, model: PreTrainedModel, family: Family) -> str:
    name = family.gguf_name(f"{layer}.weight")
    if name is None:
        raise InputError(f"GGUF has no place for an adapter of {layer}: {_INSTEAD}")
    if name == "output.weight" and is_tied(model):
        raise InputError(f"{layer} is tied to the embedding, and llama.cpp adapts no tied head: {_INSTEAD}")
    return name


def _factors(name: str, layer: AdapterLayer, alpha: float, config: PretrainedConfig) -> tuple[Tensor, Tensor]:
    """A, and B in llama.cpp's row order and for its scale alpha / rank."""
    b = layer.lora_b.detach().float() * (layer.scale * layer.rank / alpha)
    return layer.lora_a.detach().float(), family_of(config).to_gguf(f"{name}.weight", b, config).contiguous()
