"""What learns: a model, how it is trained, and among whom."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from entrenar.objectives.objective import Objective
from entrenar.optim.optimizers import OPTIMIZERS, OptimizerKind
from entrenar.training.world import ONE_PROCESS, World


@dataclass(frozen=True)
class Learner:
    """`kind` is what `optimizer` was made by."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    objective: Objective
    kind: OptimizerKind = field(default_factory=lambda: OPTIMIZERS["adamw"])
    world: World = ONE_PROCESS
