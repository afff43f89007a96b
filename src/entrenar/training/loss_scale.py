"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2).

float16 ends at 6e-8, and the gradient of a mean over thousands of tokens lies below. So the loss is multiplied by a
power of two before the backward pass and the float32 gradients of what is trained are divided by it, both without
rounding. A scale that overflows is halved and the same batch is taken again, so no batch is lost to it.
"""

import torch

from entrenar.training.state import State

FIRST, MOST = 2.0**16, 2.0**24
STEADY = 2000  # updates without an overflow after which a larger scale is tried


def first_scale(dtype: torch.dtype) -> float:
    """Scale of a new run that computes in `dtype`; 1: not scaled."""
    return FIRST if dtype is torch.float16 else 1.0


def note_success(state: State) -> None:
    """Count an update that was made; after many of them a scaled run's scale is doubled."""
    if state.loss_scale == 1:
        return
    state.steps_at_scale += 1
    if state.steps_at_scale >= STEADY and state.loss_scale < MOST:
        state.loss_scale, state.steps_at_scale = state.loss_scale * 2, 0


def lower(state: State) -> bool:
    """Halve the scale after an overflow; False when there is nothing left to halve."""
    if state.loss_scale <= 1:
        return False
    state.loss_scale, state.steps_at_scale = state.loss_scale / 2, 0
    return True
