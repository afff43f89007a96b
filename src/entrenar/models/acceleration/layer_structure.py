"""How a decoder layer puts its parts together, seen from what each part is handed (planted.py).

Another order of norm and attention, or a scaled residual, is seen whatever the model's weights are.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.models.acceleration.planted import Planted, same
from entrenar.models.acceleration.proxy import ModuleProxy


@torch.no_grad()
def is_residual_layer(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a decoder layer is h + attention(norm(h)), then h + mlp(norm(h)), and hands on all it is called with."""
    return all(_is_residual(module, kwargs, training) for training in (False, True))


def _is_residual(module: nn.Module, kwargs: dict[str, Any], training: bool) -> bool:
    sent = Planted(next(module.parameters()).device)
    h = sent.tensor(1, 4, 6)
    names = "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"
    first, attended, second, added = (sent.tensor(1, 4, 6) for _ in names)
    results: list[Any] = [first, (attended, None), second, added]
    pairs = zip(names, results, strict=True)
    parts = {name: sent.part(name, lambda *_, result=result, **__: result) for name, result in pairs}
    forward = inspect.unwrap(type(module).forward)  # without transformers' checkpointing around it
    out = forward(ModuleProxy(module, training=training, **parts), h, **kwargs)
    calls = [sent.once(name) for name in names]
    if any(call is None for call in calls) or not isinstance(out, Tensor):
        return False
    given = [{"hidden_states": args[0], **options} if args else options for args, options in filter(None, calls)]
    hidden = [next(iter(arguments.values())) for arguments in given]
    handed = {name: value for name, value in given[1].items() if name != "hidden_states"}
    right = hidden[0] is h and given[1].get("hidden_states") is first and hidden[3] is second
    right = right and handed.keys() == kwargs.keys() and all(handed[name] is kwargs[name] for name in kwargs)
    return right and same(hidden[2], h + attended) and same(out, h + attended + added)
