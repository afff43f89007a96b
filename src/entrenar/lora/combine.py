"""Several adapters into one, layer by layer; one function and one registry row for each way.

`cat` and `linear` work on the factors: cat is exact and its rank is the sum of all; linear is peft's, the sum of A's
and of B's, which has cross terms. The others work on the products Δ = scale·B·A: a weighted sum (svd), TIES (Yadav et
al. 2023, section 3) or DARE (Yu et al. 2024, equation 5), and then the best factors of the rank that is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from entrenar.core.errors import InputError, listing
from entrenar.files.peft import AdapterTensors, LayerTensors, PeftAdapter
from entrenar.files.peft_tensors import A_END, B_END
from entrenar.lora.initial import Pair, principal
from entrenar.lora.spec import of_scale_one


@dataclass(frozen=True)
class Combined:
    """An adapter, and what its rank could not hold: ‖Δ − B·A‖ / ‖Δ‖ over all layers."""

    adapter: PeftAdapter
    error: float


def combine(
    adapters: Mapping[str, PeftAdapter],
    weights: Mapping[str, float],
    method: str = "svd",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Combined:
    """One adapter of the weighted ones.

    Args:
        weights: name → weight. method: linear, cat, svd, ties, dare or dare_ties.
        rank: of the result, for those that work on products; None: the largest of theirs.
        density: share of each change that ties and dare keep. seed: of what dare drops.

    Raises:
        InputError: an unknown name or method, adapters that are more than plain LoRA, or ranks that do not fit.
    """
    unknown = sorted(weights.keys() - adapters.keys())
    if unknown or not weights:
        raise InputError(f"no adapter {listing(unknown)}: there are {listing(sorted(adapters))}")
    if method not in (*_BY_FACTORS, *_BY_PRODUCTS):
        raise InputError(f"cannot combine by {method!r}: choose {', '.join((*_BY_FACTORS, *_BY_PRODUCTS))}")
    if not 0 < density <= 1:
        raise InputError(f"density {density} is not a share: choose above 0, up to 1")
    chosen = {name: adapters[name] for name in weights}
    for name, adapter in chosen.items():
        if not adapter.is_plain:
            raise InputError(f"{name} is more than plain LoRA, and only that can be combined: see save_adapter's plain")
    generator = torch.Generator().manual_seed(seed)
    layers, lost, total = {}, 0.0, 0.0
    for layer in dict.fromkeys(layer for adapter in chosen.values() for layer in adapter.factors):
        pairs = [
            (_scaled(adapter, layer), weights[name]) for name, adapter in chosen.items() if layer in adapter.factors
        ]
        wanted = rank or max(len(a) for (a, _), _ in pairs)
        layers[layer], error, size = _combine_layer(layer, pairs, method, wanted, density, generator)
        lost, total = lost + error, total + size
    return Combined(adapter_of_pairs(layers, next(iter(chosen.values()))), (lost / total) ** 0.5 if total else 0.0)


def adapter_of_pairs(layers: Mapping[str, Pair], like: PeftAdapter | None = None) -> PeftAdapter:
    """An adapter of scale 1 from factors; its base is that of `like`."""
    tensors: LayerTensors = {name: {A_END: a, B_END: b} for name, (a, b) in layers.items()}
    return PeftAdapter(
        **of_scale_one({name: len(a) for name, (a, _) in layers.items()}), dropout=0.0, targets=list(layers),
        tensors=AdapterTensors(tensors), base_model=like.base_model if like else None,
        base_format=like.base_format if like else None,
    )  # fmt: skip


def _scaled(adapter: PeftAdapter, layer: str) -> Pair:
    """The factors of a layer on the CPU, with the scale in B."""
    a, b = adapter.factors[layer]
    return a.float().cpu(), b.float().cpu() * adapter.for_layer(layer).scale


def _combine_layer(
    layer: str, pairs: list[tuple[Pair, float]], method: str, rank: int, density: float, generator: torch.Generator
) -> tuple[Pair, float, float]:
    """The combined factors, and the squares of what they lack and of what they were to be."""
    shapes = {(a.shape[1], b.shape[0]) for (a, b), _ in pairs}
    if len(shapes) > 1:
        raise InputError(f"the adapters are for different models: at {layer} their layers have shapes {sorted(shapes)}")
    if method in _BY_FACTORS:
        return _BY_FACTORS[method](layer, pairs), 0.0, 0.0
    deltas, weights = [b @ a for (a, b), _ in pairs], [weight for _, weight in pairs]
    wanted = _BY_PRODUCTS[method](deltas, weights, density, generator)
    if rank > min(wanted.shape):
        raise InputError(f"rank {rank} does not fit {layer} of shape {tuple(wanted.shape)}: choose a smaller one")
    a, b = principal(wanted, rank)
    return (a, b), (wanted - b @ a).square().sum().item(), wanted.square().sum().item()


def _cat(layer: str, pairs: list[tuple[Pair, float]]) -> Pair:  # noqa: ARG001 - one signature
    return torch.cat([a for (a, _), _ in pairs]), torch.cat([b * weight for (_, b), weight in pairs], dim=1)


def _linear(layer: str, pairs: list[tuple[Pair, float]]) -> Pair:
    """As peft's: each factor gets the root of its weight (its sign in B)."""
    if len({len(a) for (a, _), _ in pairs}) > 1:
        raise InputError(f"linear adds factors, so ranks must be equal, and at {layer} they are not: choose svd or cat")
    roots = [abs(weight) ** 0.5 for _, weight in pairs]
    a = torch.stack([a * root for ((a, _), _), root in zip(pairs, roots, strict=True)]).sum(0)
    signed = [root if weight >= 0 else -root for (_, weight), root in zip(pairs, roots, strict=True)]
    return a, torch.stack([b * root for ((_, b), _), root in zip(pairs, signed, strict=True)]).sum(0)


def _sum(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    return torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)]).sum(0)


def _ties(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    return _elect([_largest(delta, density) for delta in deltas], weights)


def _dare(deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    return _sum([_dropped(delta, density, generator) for delta in deltas], weights, density, generator)


def _dare_ties(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator
) -> Tensor:
    return _elect([_dropped(delta, density, generator) for delta in deltas], weights)


def _largest(delta: Tensor, density: float) -> Tensor:
    """The `density` share of largest magnitude, zeros elsewhere."""
    count = int(density * delta.numel())
    mask = torch.zeros(delta.numel())
    mask[delta.abs().flatten().topk(count).indices] = 1
    return delta * mask.view(delta.shape)


def _dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A random share, made larger by what was dropped."""
    return delta * (torch.rand(delta.shape, generator=generator) < density) / density


def _elect(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of each element the mean of those whose sign is that of the sum, as peft's `ties` does it."""
    stacked = torch.stack(list(deltas))
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agree = stacked.sign() == elected
    weighted = stacked * torch.tensor(list(weights)).view(-1, 1, 1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


_BY_FACTORS: dict[str, Callable[[str, list[tuple[Pair, float]]], Pair]] = {"linear": _linear, "cat": _cat}
_BY_PRODUCTS: dict[str, Callable[[Sequence[Tensor], Sequence[float], float, torch.Generator], Tensor]] = {
    "svd": _sum,
    "ties": _ties,
    "dare": _dare,
    "dare_ties": _dare_ties,
}
