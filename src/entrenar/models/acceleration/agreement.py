"""Whether a replacement agrees with what it replaces: one hypothesis among several, a recorded trial run, a comparison.

What a module computes is decided in float32 or float64, element by element (`only_match`): the roundings of bfloat16
are wide enough to hide the difference between two hypotheses. `agree` only confirms that, in the run's dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Forward = Callable[..., Any]
# Relative to the result's norm; a few roundings of the dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
TRIAL_TOKENS = 4  # enough for rotations and masks to matter
Trial = tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]
_ROUNDINGS = 1e-5  # of each element: some of float32, in which many classes compute whatever they are given
_APART = 30  # times that, two hypotheses must differ somewhere


def only_match(expected: Tensor, hypotheses: Sequence[Tensor], floor: float = 1e-30) -> int | None:
    """Which of the hypotheses an outcome is, every element of it; None if it is none, or if two are too close to tell.

    Args:
        expected: what the class's own forward gave, float32 or float64. hypotheses: the same shape, float64.
        floor: what an element may differ by in any case.
    """
    if any(hypothesis.shape != expected.shape for hypothesis in hypotheses):
        return None
    outcome = expected.double()
    bound = _ROUNDINGS * outcome.abs() + floor
    agreeing = [index for index, one in enumerate(hypotheses) if ((one - outcome).abs() <= bound).all()]
    pairs = ((a, b) for index, a in enumerate(hypotheses) for b in hypotheses[:index])
    distinct = all(((a - b).abs() > _APART * bound).any() for a, b in pairs)
    return agreeing[0] if distinct and len(agreeing) == 1 else None


@torch.no_grad()
def recorded(model: PreTrainedModel, modules: list[nn.Module]) -> list[Trial]:
    """What each module is called with, and gives, in a run of the model over a few tokens."""
    trials: list[Trial] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        trials.append((module, args, kwargs, output))

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        ids = torch.arange(TRIAL_TOKENS, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
        model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return trials


def agree(ours: Any, expected: Any) -> bool:
    """Whether two results, tensors or tuples that begin with one, are equal to some roundings."""
    one, other = (result[0] if isinstance(result, tuple) else result for result in (ours, expected))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool((one.double() - other.double()).norm() <= TOLERANCE[other.dtype] * other.double().norm())


def sample(features: int, like: Tensor) -> Tensor:
    """A few random tokens (4, features) of the dtype and device of a tensor, the same every time."""
    generator = torch.Generator().manual_seed(features)
    return torch.randn(TRIAL_TOKENS, features, generator=generator).to(like)
