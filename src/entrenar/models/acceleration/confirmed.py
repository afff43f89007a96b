"""The whole model, made fast, against its class's own way: logits of a fixed row of tokens, compared once.

Modules were recognised one by one (fast_forwards.py); here is what they make together, in the run's dtype and in
float32, with a cache and without. The roundings of bfloat16 alone move logits by 1e-3 to 1e-2 nats a token, the
class's own as much as ours, so there both are compared with the class's own way in float32, and ours must be about as
near to it (docs/decisions/0018). The verdict is kept by content (verdicts.py).
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from entrenar.models.acceleration import attention
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from entrenar.models.acceleration.projected import Stand
from entrenar.models.acceleration.verdicts import identity, remember, remembered

_LOG = logging.getLogger(__name__)
_TOKENS, _STEPS = 24, 2  # a row of so many; with a cache the last come one by one
_NEAR = 1e-4  # nats a token: of the same arithmetic in another order, in float32
# Times the distance of the class's own way: of the mean, and of the worst token, which is one draw from a long tail.
_WORSE_MEAN, _WORSE_TOKEN = 3, 10
_PANEL = 1 << 20  # elements of a weight that are multiplied at a time, and in float32 meanwhile
_SWITCH = "_attn_implementation"


def make_fast(model: PreTrainedModel) -> None:
    """Give the model its faster forwards if its logits stay its class's own; else leave everything the class's own way,
    and say so."""
    use_fast_forwards(model)
    replaced = _replaced(model)
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
        _undo(model)
        _LOG.warning(
            "the faster forwards of %s give other logits than its class's own: everything goes the class's own way, "
            "which is slower",
            type(model).__name__,
        )


def _replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module that has a forward of ours."""
    return {name: module for name, module in model.named_modules() if _is_ours(vars(module).get("forward"))}


def _is_ours(forward: Any) -> bool:
    function = getattr(forward, "__func__", None)
    return isinstance(function, partial) or getattr(function, "__module__", "").startswith("entrenar.")


def _undo(model: PreTrainedModel) -> None:
    for module in _replaced(model).values():
        del vars(module)["forward"]
    if getattr(model.config, _SWITCH) == attention.NAME:
        model.set_attn_implementation("sdpa")


@contextmanager
def own_way(model: PreTrainedModel) -> Iterator[None]:
    """Let every module run its class's own forward meanwhile."""
    forwards = {module: vars(module)["forward"] for module in _replaced(model).values()}
    attends = getattr(model.config, _SWITCH)
    _undo(model)
    try:
        yield
    finally:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        if attends != getattr(model.config, _SWITCH):
            model.set_attn_implementation(attends)


def _tokens(model: PreTrainedModel) -> Tensor:
    """(1, _TOKENS), all over the vocabulary."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(_TOKENS, device=model.device) * 7919 + 11)[None] % vocabulary


@torch.no_grad()
def _agrees(model: PreTrainedModel, ids: Tensor) -> bool:
    head = model.get_output_embeddings()
    with _replacing(head, partial(_linear, head)) if isinstance(head, nn.Linear) else nullcontext():
        with own_way(model):
            own = _runs(model, ids)
        fast = _runs(model, ids)
        if len(fast) < len(own):
            return False
        if model.dtype in (torch.float32, torch.float64):
            return all(map(_near, own, fast))
        wide = _pair_in_float32(model, ids)
        if wide is None:
            return all(map(_near, own, fast))
        return _near(*wide) and all(_as_near(wide[0], *pair) for pair in zip(fast, own, strict=True))


def _runs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Logits (T, V) of one pass, and of several with a cache, the last tokens one by one, if the model has a cache."""
    runs = [model(input_ids=ids, use_cache=False).logits[0]]
    with suppress(AttributeError, TypeError, ValueError):
        cache, found = None, []
        for part in ids.split([ids.shape[1] - _STEPS, *[1] * _STEPS], dim=1):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0])
        runs.append(torch.cat(found))
    return runs


def _pair_in_float32(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logits of the class's own way and of ours, computed in float32; None if its class cannot."""
    try:
        with _in_float32(model):
            fast = model(input_ids=ids, use_cache=False).logits[0]
            with own_way(model):
                return model(input_ids=ids, use_cache=False).logits[0], fast
    except (RuntimeError, TypeError, ValueError):
        return None


def _near(expected: Tensor, found: Tensor) -> bool:
    return bool(_divergence(expected, found).max() <= _NEAR)


def _as_near(truth: Tensor, found: Tensor, own: Tensor) -> bool:
    """Whether `found` is about as near to the truth as `own` is."""
    ours, theirs = _divergence(truth, found), _divergence(truth, own)
    bounds = ((torch.mean, _WORSE_MEAN), (torch.max, _WORSE_TOKEN))
    return all(bool(of(ours) <= times * of(theirs) + _NEAR) for of, times in bounds)


def _divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Kullback-Leibler, nats, of each token: logits (T, V) twice → (T,) float64."""
    pairs = zip(expected, found, strict=True)  # a token at a time: a vocabulary is large
    return torch.stack([_of_one(one.double().log_softmax(0), other.double().log_softmax(0)) for one, other in pairs])


def _of_one(one: Tensor, other: Tensor) -> Tensor:
    return torch.where(one.isneginf(), 0.0, one.exp() * (one - other)).sum()


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute in float32 meanwhile, its weights where and as they are."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.enter_context(_replacing(module, partial(_linear, module)))
                # A layer with a hook is called by itself, not together with others.
                stack.callback(module.register_forward_hook(lambda *_: None).remove)
            elif isinstance(module, nn.LayerNorm | nn.Conv1d | Conv1D):
                wide = {name: p.float() for name, p in module.named_parameters(recurse=False)}
                stack.enter_context(_replacing(module, partial(_of(type(module)), Stand(module, **wide))))
        embedding = cast(nn.Module, model.get_input_embeddings())
        stack.callback(embedding.register_forward_hook(lambda _, __, output: output.float()).remove)
        yield


def _of(kind: type[nn.Module]) -> Any:
    return kind.forward


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """What the layer computes, in the dtype of x.

    A panel of its weight at a time and all through one room: many short-lived ones, results between them, cut the heap
    up until it is as large as the whole weight.
    """
    rows, weight = x.reshape(-1, x.shape[-1]), module.weight
    size = max(_PANEL // module.in_features, 1)
    room, y = weight.new_empty(size, module.in_features, dtype=x.dtype), x.new_empty(len(weight), len(rows))
    for panel, part in zip(weight.split(size), y.split(size), strict=True):
        torch.mm(room[: len(panel)].copy_(panel), rows.t(), out=part)
    y = y.t().reshape(*x.shape[:-1], -1)
    return y if module.bias is None else y + module.bias


@contextmanager
def _replacing(module: nn.Module, forward: Any) -> Iterator[None]:
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        vars(module).pop("forward") if before is None else vars(module).update(forward=before)
