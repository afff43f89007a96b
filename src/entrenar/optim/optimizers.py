"""Every optimiser by name: how it is made, what it holds, and which weights it is evaluated with."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from entrenar.optim.adamw import adamw_state_bytes, make_adamw

Groups = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """What a config says of the optimiser."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def _as_trained(_: torch.optim.Optimizer) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class OptimizerKind:
    """One optimiser.

    make(groups, options) → over groups of parameters (optim/groups.py), whose rates the loop sets at every step. Its
    state is tensors per parameter, which a checkpoint stores whatever they are called, made here or in the first step.
    state_bytes(parameters) → what that state takes.
    evaluating(optimizer): inside it the parameters are what the model is evaluated and saved with, where those are not
    the ones that are trained (an average of them, say).
    """

    make: Callable[[Groups, OptimizerOptions], torch.optim.Optimizer]
    state_bytes: Callable[[Sequence[nn.Parameter]], int]
    evaluating: Callable[[torch.optim.Optimizer], AbstractContextManager[None]] = _as_trained


def _adamw(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    return make_adamw(groups, options.lr, (options.beta1, options.beta2), options.eps, options.weight_decay)


OPTIMIZERS = {"adamw": OptimizerKind(make=_adamw, state_bytes=adamw_state_bytes)}
