"""What the decoder layers save for their backward: how much that is, seen in a trial pass, and how to have it less."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from entrenar.layers.recompute import Recompute
from entrenar.models.acceleration import fast_layers


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be told what to compute again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def ladder(model: PreTrainedModel) -> tuple[Recompute, ...]:
    """What a layer of this model, in training mode, can be told to compute again: from the fastest to the leanest."""
    if not decoder_layers(model):
        return (Recompute.NOTHING,)
    return (
        (Recompute.NOTHING, Recompute.CHEAP, Recompute.ALL)
        if recompute_inside(model)
        else (Recompute.NOTHING, Recompute.ALL)
    )


def recompute_inside(model: PreTrainedModel) -> bool:
    """Whether layers compute again inside themselves, as native ones can."""
    return model.device.type == "cpu" and fast_layers.serve(model)


def set_recompute(model: PreTrainedModel, choices: Sequence[Recompute]) -> None:
    """Say for each decoder layer what it computes again; numbers stay the same to the last bit.

    Layers with a native forward (fast_layers.py) compute again inside it; others are run twice (Chen et al. 2016,
    "Training Deep Nets with Sublinear Memory Cost"), dropout drawn the same.
    """
    native = recompute_inside(model)
    for layer, choice in zip(decoder_layers(model), choices, strict=True):
        fast_layers.set_recompute(layer, choice)
        layer.gradient_checkpointing = choice is Recompute.ALL and not native
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # pyright: ignore[reportArgumentType]


def saved_per_token(model: PreTrainedModel, choice: Recompute, tokens: int, loss: Callable[[], Tensor]) -> int:
    """Bytes a token that autograd holds between forward and backward if every layer recomputes `choice`.

    Counted in a pass over a few `tokens`, which computes `loss`, the model in training mode; parameters and buffers
    aside.
    """
    layers = decoder_layers(model)
    set_recompute(model, [choice] * len(layers))
    own_storages = {
        tensor.untyped_storage().data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors
    }
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own_storages:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad(), torch.random.fork_rng():
        total = loss()
    del total
    # The input of a layer that will be run twice is held by its checkpoint, out of the hooks' sight.
    inputs = sum(layer.gradient_checkpointing for layer in layers) * _hidden_bytes(model)
    return sum(sizes.values()) // tokens + inputs


def _hidden_bytes(model: PreTrainedModel) -> int:
    """Of one token's hidden state."""
    return model.config.get_text_config().hidden_size * model.dtype.itemsize
