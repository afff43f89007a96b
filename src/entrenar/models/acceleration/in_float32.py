"""A model that computes in float32 for a while, its weights where and as they are."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from entrenar.models.acceleration.proxy import ModuleProxy

_PANEL = 1 << 20  # elements of a weight that are multiplied at a time, and in float32 meanwhile


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Let the model compute in float32 meanwhile, its weights where and as they are."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.enter_context(replacing_forward(module, partial(linear_in_panels, module)))
                # A layer with a hook is called by itself, not together with others.
                stack.callback(module.register_forward_hook(lambda *_: None).remove)
            elif isinstance(module, nn.LayerNorm | nn.Conv1d | Conv1D):
                wide = {name: p.float() for name, p in module.named_parameters(recurse=False)}
                stack.enter_context(replacing_forward(module, partial(_of(type(module)), ModuleProxy(module, **wide))))
        embedding = cast(nn.Module, model.get_input_embeddings())
        stack.callback(embedding.register_forward_hook(lambda _, __, output: output.float()).remove)
        yield


def _of(kind: type[nn.Module]) -> Any:
    return kind.forward


def linear_in_panels(module: nn.Linear, x: Tensor) -> Tensor:
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
def replacing_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let the module run that forward meanwhile."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        vars(module).pop("forward") if before is None else vars(module).update(forward=before)
