"""Tensors into their places in a model: parameters, saved buffers, experts, and layers for quantized weights."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers.quantized_embedding import QuantizedEmbedding
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.models.experts import ExpertsBuilder, expert_weights, parameter_name
from entrenar.opening.match import saved_buffers
from entrenar.quant.tensor import QuantizedTensor


class Places:
    """Where the tensors of a source belong in a model that is on `meta`.

    Args:
        names: of every tensor of the source. dtype: of the computation. device: where the tensors go.

    Attributes:
        buffers: the buffers that the files hold. experts: takes the matrices of a mixture's experts.
    """

    def __init__(self, model: PreTrainedModel, names: set[str], dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self.buffers = saved_buffers(model)
        self.experts = ExpertsBuilder(model, expert_weights(model, names))

    def put(self, name: str, weight: Tensor | QuantizedTensor) -> None:
        """One tensor, by its name in the source."""
        weight = weight.to(self._device)
        if name in self.experts:
            self.experts.take(name, weight)
        elif name in self.buffers:
            self._put_buffer(name, cast(Tensor, weight))
        else:
            self._put_weight(parameter_name(name), weight)

    def _put_buffer(self, name: str, value: Tensor) -> None:
        """In the dtype that the module has it in: transformers does not round them either."""
        owner, _, leaf = name.rpartition(".")
        self._model.get_submodule(owner)._buffers[leaf] = value

    def _put_weight(self, name: str, weight: Tensor | QuantizedTensor) -> None:
        """A parameter in its module; for a quantized weight a layer in the place of the module that has it."""
        owner, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(owner)
        if isinstance(weight, QuantizedTensor):
            self._replace(owner, _quantized_layer(module, weight, self._dtype))
            return
        parameter = nn.Parameter(weight, requires_grad=False)
        # transformers' initialisation, which `complete.compute_buffers` runs, must leave this one alone.
        parameter._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        setattr(module, leaf, parameter)

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)


def _quantized_layer(module: nn.Module, weight: QuantizedTensor, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(weight, dtype)
    assert isinstance(module, nn.Linear)
    return QuantizedLinear(weight, module.bias)
