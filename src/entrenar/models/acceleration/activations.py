"""What the decoder layers keep for their backward: how much that is, seen in a trial pass, and how to have it less."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from entrenar.layers.residual_blocks import Keep
from entrenar.models.acceleration import fast_layers
from entrenar.models.forward import target_loss
from entrenar.models.head import vocabulary_size

_TRIAL_TOKENS = 32


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be told what to keep."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def ladder(model: PreTrainedModel) -> tuple[Keep, ...]:
    """What a layer of this model, in training mode, can be told to keep: from the fastest to the leanest."""
    if not decoder_layers(model):
        return (Keep.ALL,)
    return (Keep.ALL, Keep.DEAR, Keep.NOTHING) if recompute_inside(model) else (Keep.ALL, Keep.NOTHING)


def recompute_inside(model: PreTrainedModel) -> bool:
    """Whether layers compute again inside themselves, as native ones can."""
    return model.device.type == "cpu" and fast_layers.serve(model)


def set_keep(model: PreTrainedModel, choices: Sequence[Keep]) -> None:
    """Say for each decoder layer what it keeps; numbers stay the same to the last bit.

    Layers with a native forward (fast_layers.py) compute again inside it; others are run twice (Chen et al. 2016,
    "Training Deep Nets with Sublinear Memory Cost"), dropout drawn the same.
    """
    native = recompute_inside(model)
    for layer, choice in zip(decoder_layers(model), choices, strict=True):
        fast_layers.set_keep(layer, choice)
        layer.gradient_checkpointing = choice is Keep.NOTHING and not native
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # pyright: ignore[reportArgumentType]


def kept_per_token(model: PreTrainedModel, choice: Keep) -> int:
    """Bytes a token that autograd holds between forward and backward if every layer keeps `choice`.

    Counted in a pass over a few tokens, the model in training mode; parameters and buffers aside.
    """
    layers = decoder_layers(model)
    set_keep(model, [choice] * len(layers))
    held = {tensor.untyped_storage().data_ptr() for each in (model.parameters(), model.buffers()) for tensor in each}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(_TRIAL_TOKENS, device=model.device)[None]
    with saved_tensors_hooks(note, lambda tensor: tensor), torch.enable_grad(), torch.random.fork_rng():
        loss = target_loss(model, ids % vocabulary_size(model), ids, ids > 0)
    del loss
    # The input of a layer that will be run twice is held by its checkpoint, out of the hooks' sight.
    inputs = sum(layer.gradient_checkpointing for layer in layers) * _hidden_bytes(model)
    return sum(kept.values()) // _TRIAL_TOKENS + inputs


def _hidden_bytes(model: PreTrainedModel) -> int:
    """Of one token's hidden state."""
    return model.config.get_text_config().hidden_size * model.dtype.itemsize
