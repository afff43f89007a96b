"""The whole model, made fast, against its class's own way: logits of a fixed row of tokens, compared once.

Modules were recognised one by one (fast_forwards.py); here is what they make together, in the run's dtype and in
float32, with a cache and without. The roundings of bfloat16 alone move logits by 1e-3 to 1e-2 nats a token, the
class's own as much as ours, so there both are compared with the class's own way in float32, and ours must be about as
near to it (docs/decisions/0018). The verdict is remembered by content (verdicts.py).
"""

import logging
from contextlib import nullcontext, suppress
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from entrenar.models.acceleration.in_float32 import in_float32, linear_in_panels, replacing_forward
from entrenar.models.acceleration.swapped import own_way, restore, swapped
from entrenar.models.acceleration.verdicts import identity, remember, remembered

_LOG = logging.getLogger(__name__)
_TOKENS, _STEPS = 24, 2  # a row of so many; with a cache the last come one by one
_NEAR = 1e-4  # nats a token: of the same arithmetic in another order, in float32
# Times the distance of the class's own way: of the mean, and of the worst token, which is one draw from a long tail.
_WORSE_MEAN, _WORSE_TOKEN = 3, 10


def make_fast(model: PreTrainedModel) -> None:
    """Give the model its faster forwards if its logits stay its class's own; else leave everything the class's own way,
    and say so."""
    use_fast_forwards(model)
    replaced = swapped(model)
    if not replaced:
        return
    ids = _tokens(model)
    key = identity(model, replaced, ids)
    agrees = remembered(key)
    if agrees is None:
        try:
            agrees = _agrees(model, ids)
            remember(key, agrees)
        except Exception as error:  # whatever running it raises
            _LOG.warning("%s cannot be tried on a few tokens: %s", type(model).__name__, error)
            agrees = False
    if not agrees:
        restore(model)
        _LOG.warning(
            "the faster forwards of %s give other logits than its class's own: everything goes the class's own way, "
            "which is slower",
            type(model).__name__,
        )


def _tokens(model: PreTrainedModel) -> Tensor:
    """(1, _TOKENS), all over the vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(_TOKENS, device=model.device) * 7919 + 11)[None] % vocabulary


@torch.no_grad()
def _agrees(model: PreTrainedModel, ids: Tensor) -> bool:
    head = model.get_output_embeddings()
    with replacing_forward(head, partial(linear_in_panels, head)) if isinstance(head, nn.Linear) else nullcontext():
        with own_way(model):
            expected = _runs(model, ids)
        fast = _runs(model, ids)
        if len(fast) < len(expected):
            return False
        if model.dtype in (torch.float32, torch.float64):
            return all(map(_near, expected, fast))
        wide = _pair_in_float32(model, ids)
        if wide is None:
            return all(map(_near, expected, fast))
        return _near(*wide) and all(_as_near(wide[0], *pair) for pair in zip(fast, expected, strict=True))


def _runs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Logits (T, V) of one pass, and of several with a cache, the last tokens one by one, if the model has a cache."""
    runs = [model(input_ids=ids, use_cache=False).logits[0]]
    with suppress(AttributeError, TypeError, ValueError):
        cache, parts = None, []
        for part in ids.split([ids.shape[1] - _STEPS, *[1] * _STEPS], dim=1):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits[0])
        runs.append(torch.cat(parts))
    return runs


def _pair_in_float32(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logits of the class's own way and of ours, computed in float32; None if its class cannot."""
    try:
        with in_float32(model):
            fast = model(input_ids=ids, use_cache=False).logits[0]
            with own_way(model):
                return model(input_ids=ids, use_cache=False).logits[0], fast
    except (RuntimeError, TypeError, ValueError):
        return None


def _near(expected: Tensor, logits: Tensor) -> bool:
    return bool(_divergence(expected, logits).max() <= _NEAR)


def _as_near(truth: Tensor, fast: Tensor, original: Tensor) -> bool:
    """Whether `fast` is about as near to the truth as the class's own way, `original`, is."""
    ours, theirs = _divergence(truth, fast), _divergence(truth, original)
    bounds = ((torch.mean, _WORSE_MEAN), (torch.max, _WORSE_TOKEN))
    return all(bool(of(ours) <= times * of(theirs) + _NEAR) for of, times in bounds)


def _divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler, nats, of each token: logits (T, V) twice → (T,) float64."""
    pairs = zip(expected, logits, strict=True)  # a token at a time: a vocabulary is large
    return torch.stack([_of_one(one.double().log_softmax(0), other.double().log_softmax(0)) for one, other in pairs])


def _of_one(one: Tensor, other: Tensor) -> Tensor:
    return torch.where(one.isneginf(), 0.0, one.exp() * (one - other)).sum()
