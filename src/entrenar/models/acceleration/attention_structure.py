"""How an attention module puts its parts together, seen from what each part is handed (planted.py).

Another order of norm and rotation, a clip or a gate is seen whatever the model's weights are. Letters: B rows, T
tokens, C hidden size, H heads, G key-value heads, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.models.acceleration import attention
from entrenar.models.acceleration.planted import Planted, same
from entrenar.models.acceleration.proxy import ModuleProxy, ProjectedAttention
from entrenar.models.acceleration.rotation import Rotation, RotationSpy

# What a layer may ask of attention beside a scale; windows are in the mask.
_OPTIONS = {"dropout", "scaling", "position_ids", "use_cache", "sliding_window"}


@dataclass(frozen=True)
class AttentionStructure:
    """Of attention that is output(attend(rotate(norm(q(x))), rotate(norm(k(x))), v(x))); no rotation: None."""

    scale: float
    rotation: Rotation | None


@dataclass(frozen=True)
class Projections:
    """Of attention whose q, k and v are projections of its very input: what rotates q and k, if that is seen."""

    rotation: Rotation | None


@torch.no_grad()
def projections_of_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Projections | None:
    """What is seen in a call whose q, k and v are projections of its very input, each made once and left as it is.

    None for any other call: what is written to in place (OLMo's clip) cannot be one of several outputs that autograd
    has made together.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    calls: list[tuple[nn.Module, Any, Tensor, int]] = []  # layer, input, output, and the output's version

    def noting(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            calls.append((layer, x, (y := layer(x)), y._version))
            return y

        return call

    layers = [module.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
    q, k, v = map(noting, layers)
    spy = RotationSpy(type(module).forward, kwargs.get("position_embeddings"))
    spy.forward(ModuleProxy(module, q_proj=q, k_proj=k, v_proj=v), *args, **kwargs)
    once = sorted(id(layer) for layer, *_ in calls) == sorted(map(id, layers))
    untouched = all(y._version == version for _, _, y, version in calls)
    return Projections(spy.rotation) if once and untouched and all(x is hidden for _, x, *_ in calls) else None


@torch.no_grad()
def attention_structure(module: Any, kwargs: dict[str, Any]) -> AttentionStructure | None:
    """Scale and rotation of an attention module that is of the known structure; None for any other.

    Args:
        kwargs: of a call of its layer over a few tokens, with `position_embeddings` where it rotates.
    """
    sent = Planted(next(module.parameters()).device)
    positions = kwargs.get("position_embeddings")
    tokens = 4 if positions is None else positions[0].shape[1]
    widths = {name: module.get_submodule(f"{name}_proj").out_features for name in "qkv"}
    flat = {name: sent.tensor(1, tokens, width) for name, width in widths.items()}
    heads = {name: one.view(1, tokens, -1, module.head_dim).transpose(1, 2) for name, one in flat.items()}
    norms = [name for name in ("q_norm", "k_norm") if name in module._modules]
    parts = {name: sent.like(name) for name in norms} | {"o_proj": sent.part("o_proj", lambda _: flat["q"])}
    rotated = {name: sent.tensor(*heads[name].shape) for name in "qk"}
    attended = sent.tensor(*heads["q"].transpose(1, 2).shape)
    spy = RotationSpy(type(module).forward, positions, lambda *_: (rotated["q"], rotated["k"]))
    with attention.intercepted(sent.part("attend", lambda *_, **__: (attended, None))):
        result = spy.forward(ProjectedAttention(module, *flat.values(), **parts), hidden_states=flat["q"] / 2, **kwargs)
    normed = _normed(heads, norms, sent)
    if normed is None or len(spy.calls) > 1:
        return None
    for _, q, k in spy.calls:
        if not (same(q, normed["q"]) and same(k, normed["k"])):
            return None
        normed |= rotated
    out = sent.once("o_proj")
    if out is None or not same(out[0][0], attended.flatten(2)) or result[0] is not flat["q"]:
        return None
    scale = _scale(sent.once("attend"), list(normed.values()), kwargs.get("attention_mask"))
    return None if scale is None else AttentionStructure(scale, spy.rotation)


def _normed(heads: dict[str, Tensor], norms: list[str], sent: Planted) -> dict[str, Tensor] | None:
    """q, k and v (1, heads, T, D) behind their norms; None if a norm was not given its heads, once."""
    result = dict(heads)
    for name in norms:
        head, call, normed = name[0], sent.once(name), sent.results.get(name)
        if call is None or normed is None:
            return None
        if same(call[0][0], heads[head].transpose(1, 2)):  # before heads and tokens are swapped, or after it
            normed = normed.transpose(1, 2)
        elif not same(call[0][0], heads[head]):
            return None
        result[head] = normed
    return result


def _scale(call: tuple[tuple[Any, ...], dict[str, Any]] | None, qkv: list[Tensor], mask: Tensor | None) -> float | None:
    """The scale attention was asked for, if it was given q, k, v and the mask as they were and nothing unknown."""
    if call is None:
        return None
    (_, *given), options = call
    known = options.keys() <= _OPTIONS and not options.get("dropout") and isinstance(options.get("scaling"), float)
    right = len(given) == 4 and given[3] is mask and all(map(same, given[:3], qkv))
    return options["scaling"] if known and right else None
