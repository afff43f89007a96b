"""Learning-rate schedules as pure functions of the step: warm-up, then constant, linear or cosine decay to zero."""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]

# Share of the decay that is done, 0 to 1 → factor on the peak rate.
SCHEDULES: dict[ScheduleName, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, schedule: ScheduleName) -> float:
    """Factor on the peak learning rate for update `step` (from 0).

    Warm-up rises linearly over `warmup_steps` updates, the first of which already moves; the decay then goes from 1 to
    0 over the rest (cosine: SGDR, Loshchilov and Hutter 2017, equation 5, one cycle).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SCHEDULES[schedule]((step - warmup_steps) / max(total_steps - warmup_steps, 1))
