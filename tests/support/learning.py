"""A learner of a model and an optimiser, by supervised training."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from entrenar.data.batches import Batch
from entrenar.layers.recompute import Recompute
from entrenar.lora.attach import trained_parameters
from entrenar.models.acceleration.activations import saved_per_token
from entrenar.models.head import vocabulary_size
from entrenar.objectives.supervised import SUPERVISED
from entrenar.training.learner import Learner
from entrenar.training.step import accumulate


def learner(model: PreTrainedModel, optimizer: torch.optim.Optimizer | None = None) -> Learner:
    """Without an optimiser one that is not used."""
    unused = torch.optim.SGD([parameter for _, parameter in trained_parameters(model)])
    return Learner(model, optimizer or unused, SUPERVISED)


def accumulated(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter] = (),
    loss_scale: float = 1.0,
) -> float:
    """Gradients of a batch, and its mean loss."""
    return accumulate(learner(model), batches, parameters, loss_scale).loss


def saved_bytes(model: PreTrainedModel, level: Recompute) -> int:
    """Bytes a token that a supervised step saves at a level of recomputation."""
    batch = SUPERVISED.trial([index % vocabulary_size(model) for index in range(32)])
    return saved_per_token(model, level, 32, lambda: SUPERVISED.loss(model, batch).total)
