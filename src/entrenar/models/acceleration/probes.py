"""How an attention module and a decoder layer put their parts together, seen from what each part is handed.

Known tensors stand for what the parts compute, so the class's own forward only moves them about: what arrives must be
what was sent, to the last bit, and another order of norm and rotation, a clip, a gate or a scaled residual is seen
whatever the model's weights are. Letters: B rows, T tokens, C hidden size, H heads, G key-value heads, D width.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.models.acceleration import attention
from entrenar.models.acceleration.projected import Projected, Stand, rotating_by
from entrenar.ops.rotary import rotary

_SIZE = 1e3  # of the planted numbers: what is clipped somewhere is clipped here
# What a layer may ask of attention beside a scale; windows are in the mask.
_OPTIONS = {"dropout", "scaling", "position_ids", "use_cache", "sliding_window"}


@dataclass(frozen=True)
class AttentionStructure:
    """Of attention that is output(attend(rotate(norm(q(x))), rotate(norm(k(x))), v(x)))."""

    scale: float
    rotates: bool


class _Sent:
    """Planted tensors, and what arrived where."""

    def __init__(self, device: torch.device) -> None:
        self._generator, self._device = torch.Generator().manual_seed(0), device
        self.arrived: dict[str, list[Any]] = {}
        self.results: dict[str, Tensor] = {}

    def planted(self, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=self._generator, dtype=torch.float64) * _SIZE).to(self._device)

    def part(self, name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        """Something callable that notes what it is given."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.arrived.setdefault(name, []).append((args, kwargs))
            return result(*args, **kwargs)

        return call

    def like(self, name: str) -> Callable[..., Tensor]:
        """The same, whose result is planted in the shape of what it is given."""

        def call(x: Tensor) -> Tensor:
            self.results[name] = self.planted(*x.shape)
            return self.results[name]

        return self.part(name, call)

    def once(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        calls = self.arrived.get(name, [])
        return calls[0] if len(calls) == 1 else None


@torch.no_grad()
def projects_its_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call's q, k and v are projections of its very input, each made once, and then left as they are.

    What is written to in place (OLMo's clip) cannot be one of several outputs that autograd has made together.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    seen: list[Any] = []
    made: list[tuple[Tensor, int]] = []

    def noting(layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            seen.append((layer, x))
            made.append(((y := layer(x)), y._version))
            return y

        return call

    layers = [module.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
    q, k, v = map(noting, layers)
    type(module).forward(Stand(module, q_proj=q, k_proj=k, v_proj=v), *args, **kwargs)  # pyright: ignore[reportArgumentType]
    each_once = sorted(id(layer) for layer, _ in seen) == sorted(map(id, layers))
    untouched = all(y._version == version for y, version in made)
    return each_once and untouched and all(x is hidden for _, x in seen)


@torch.no_grad()
def rotates_halves(module: Any, rotated: int) -> bool:
    """Whether an attention module's class rotates as ops/rotary.py does: in float64, every element.

    Args:
        rotated: how many numbers of each head its cosines and sines are for.
    """
    own, sent = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None), _Sent(torch.device("cpu"))
    width = getattr(module, "head_dim", None)
    if own is None or not isinstance(width, int):
        return False
    q, k = (sent.planted(2, heads, 3, width) for heads in (4, 2))
    cos, sin = (sent.planted(2, 3, rotated) / _SIZE for _ in range(2))  # of halves that differ
    try:
        expected = own(q, k, cos, sin)
    except Exception:  # it takes something else
        return False
    return all(_close(one, other) for one, other in zip(rotate_both(q, k, cos, sin), expected, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, 1e-9, 1e-9)


def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D) and k (B, G, T, D) rotated; views of (B, T, heads, D)."""
    rotated_q, rotated_k = (rotary(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))
    return rotated_q, rotated_k


@torch.no_grad()
def attention_structure(module: Any, kwargs: dict[str, Any]) -> AttentionStructure | None:
    """Scale and rotation of an attention module that is of the known structure; None for any other.

    Args:
        kwargs: of a call of its layer over a few tokens, with `position_embeddings` where it rotates.
    """
    forward_of = type(module).forward
    sent = _Sent(next(module.parameters()).device)
    tokens = kwargs["position_embeddings"][0].shape[1] if kwargs.get("position_embeddings") is not None else 4
    widths = {name: module.get_submodule(f"{name}_proj").out_features for name in "qkv"}
    flat = {name: sent.planted(1, tokens, width) for name, width in widths.items()}
    heads = {name: each.view(1, tokens, -1, module.head_dim).transpose(1, 2) for name, each in flat.items()}
    parts = {name: sent.like(name) for name in ("q_norm", "k_norm") if name in module._modules} | {
        "o_proj": sent.part("o_proj", lambda _: flat["q"])
    }
    turned = {name: sent.planted(*heads[name].shape) for name in "qk"}
    attended = sent.planted(*heads["q"].transpose(1, 2).shape)
    forward = rotating_by(forward_of, sent.part("rotary", lambda *_: (turned["q"], turned["k"])))
    if forward is None:
        return None
    with attention.intercepted(sent.part("attend", lambda *_, **__: (attended, None))):
        result = forward(Projected(module, *flat.values(), **parts), hidden_states=flat["q"] / 2, **kwargs)
    rotates, asked, out = "rotary" in sent.arrived, sent.once("attend"), sent.once("o_proj")
    for name in "qk" if "q_norm" in parts else "":
        given, made = sent.once(f"{name}_norm"), sent.results.get(f"{name}_norm")
        if given is None or made is None:
            return None
        if _same(given[0][0], heads[name].transpose(1, 2)):  # before heads and tokens are swapped, or after it
            made = made.transpose(1, 2)
        elif not _same(given[0][0], heads[name]):
            return None
        heads[name] = made
    if rotates:
        turning = sent.once("rotary")
        cos, sin = kwargs["position_embeddings"]
        wanted = heads["q"], heads["k"], cos, sin
        if turning is None or turning[1] or len(turning[0]) != 4 or not all(map(_same, turning[0], wanted)):
            return None
        heads |= turned
    if asked is None or out is None or not _same(out[0][0], attended.flatten(2)) or result[0] is not flat["q"]:
        return None
    (_, *given), options = asked
    wanted = *heads.values(), kwargs.get("attention_mask")
    known = options.keys() <= _OPTIONS and not options.get("dropout") and isinstance(options.get("scaling"), float)
    same = len(given) == 4 and given[3] is wanted[3] and all(map(_same, given[:3], wanted[:3]))
    return AttentionStructure(options["scaling"], rotates) if known and same else None


@torch.no_grad()
def is_residual_layer(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a decoder layer is h + attention(norm(h)), then h + mlp(norm(h)), and hands on all it is called with."""
    return all(_is_residual(module, kwargs, training) for training in (False, True))


def _is_residual(module: nn.Module, kwargs: dict[str, Any], training: bool) -> bool:
    sent = _Sent(next(module.parameters()).device)
    h = sent.planted(1, 4, 6)
    names = "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"
    first, attended, second, added = (sent.planted(1, 4, 6) for _ in names)
    results: list[Any] = [first, (attended, None), second, added]
    made = zip(names, results, strict=True)
    parts = {name: sent.part(name, lambda *_, result=result, **__: result) for name, result in made}
    forward = inspect.unwrap(type(module).forward)  # without transformers' checkpointing around it
    out = forward(Stand(module, training=training, **parts), h, **kwargs)
    calls = [sent.once(name) for name in names]
    if any(call is None for call in calls) or not isinstance(out, Tensor):
        return False
    given = [{"hidden_states": args[0], **options} if args else options for args, options in filter(None, calls)]
    hidden = [next(iter(each.values())) for each in given]
    handed = {name: value for name, value in given[1].items() if name != "hidden_states"}
    same = hidden[0] is h and given[1].get("hidden_states") is first and hidden[3] is second
    same = same and handed.keys() == kwargs.keys() and all(handed[name] is kwargs[name] for name in kwargs)
    return same and _same(hidden[2], h + attended) and _same(out, h + attended + added)


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)
