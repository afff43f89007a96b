"""Which modules can be adapted, and by which layer: one row for each kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from entrenar.files.lora_options import LayerSpec
from entrenar.layers.quantized_experts import ExpertProjection
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.embedding import EmbeddingLoRALayer
from entrenar.lora.experts import ExpertLoRALayer
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.low_rank import AdapterLayer
from entrenar.lora.qlora_layer import QLoRALayer


@dataclass(frozen=True)
class Kind:
    """A class of modules; `is_linear`: "all-linear" means it too.

    Experts are adapted where they are named: they are so many that they would be most of the adapter.
    """

    module: type[nn.Module]
    adapt: Callable[[Any, LayerSpec], AdapterLayer]
    is_linear: bool = True


def kind_of(module: nn.Module) -> Kind | None:
    """The row of a module, None if it cannot be adapted."""
    return next((kind for kind in KINDS if isinstance(module, kind.module)), None)


# Layers whose weight the architecture takes out of them, so that an adapter over one is not seen: what peft 0.21.2
# refuses, and the time step's projection, whose bias is added apart.
_MIXER = {"out_proj", "conv1d"}
_OUTSIDE = {
    "mamba": _MIXER | {"dt_proj"}, "falcon_mamba": _MIXER | {"dt_proj"}, "jamba": {"dt_proj"}, "mamba2": _MIXER,
    "falcon_h1": _MIXER, "nemotron_h": _MIXER,
}  # fmt: skip


def incompatible(model: nn.Module) -> set[str]:
    """Last words of the paths of layers that cannot be adapted in this architecture."""
    return _OUTSIDE.get(getattr(getattr(model, "config", None), "model_type", ""), set())


def _quantized(module: QuantizedLinear, spec: LayerSpec) -> QLoRALayer:
    weight = module.quantized_weight
    return QLoRALayer(weight, spec.rank, spec.alpha, spec.dropout, module.bias, rslora=spec.rslora)


def _linear(module: nn.Linear, spec: LayerSpec) -> LoRALayer:
    return LoRALayer(module.weight, spec.rank, spec.alpha, spec.dropout, module.bias, rslora=spec.rslora)


def _conv1d(module: Conv1D, spec: LayerSpec) -> LoRALayer:
    """GPT-2's linear layer keeps its weight as (d_in, d_out)."""
    layer = LoRALayer(module.weight.t(), spec.rank, spec.alpha, spec.dropout, module.bias, rslora=spec.rslora)
    layer.is_transposed = True
    return layer


def _embedding(module: nn.Embedding, spec: LayerSpec) -> EmbeddingLoRALayer:
    """Ids cannot be dropped: as in peft, dropout is for the linear layers beside it."""
    return EmbeddingLoRALayer(module, spec.rank, spec.alpha, rslora=spec.rslora)


KINDS = (
    Kind(ExpertProjection, ExpertLoRALayer, is_linear=False),
    Kind(QuantizedLinear, _quantized),
    Kind(nn.Linear, _linear),
    Kind(Conv1D, _conv1d),
    Kind(nn.Embedding, _embedding, is_linear=False),
)
