"""How factors start: one function and one registry row each.

`default` and `gaussian` leave the base alone. `pissa` and `loftq` move a part of the weight into the factors, and the
base becomes what is left: W − scale·B·A, which a quantized base then holds quantized.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from entrenar.core.errors import InputError
from entrenar.files.peft import TAKEN_NAME, PeftAdapter
from entrenar.files.peft_config import CHANGES_BASE
from entrenar.files.peft_tensors import A_END, B_END
from entrenar.lora.linear_adapter import LinearAdapter
from entrenar.lora.lora_layer import LoRALayer
from entrenar.lora.low_rank import draw

# A layer's name → its weight (d_out, d_in) before it was quantized.
Original = Callable[[str], Tensor]
# Starts the factors of a layer, given its name, and its base with them.
Starter = Callable[[str, LinearAdapter], None]
# What a base does to a weight: (d_out, d_in) float32 → the same as the base will hold it.
Rounding = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor]
# (W (d_out, d_in) float32, rank, rounding, n) → factors (A (rank, d_in), B (d_out, rank)), and the pair whose product
# is taken out of the base: W ≈ rounding(W − B₀·A₀) + B·A.
Start = Callable[[Tensor, int, Rounding, int], tuple[Pair, Pair]]


@dataclass(frozen=True)
class Initial:
    """A row: `start` for one that needs the base's weight, `redraw` for one that only fills A anew.

    `count`: the number behind the name, if the name is given without one.
    """

    redraw: Callable[[Tensor, int], None] | None = None
    start: Start | None = None
    count: int = 0


def pissa(weight: Tensor, rank: int, rounding: Rounding, count: int) -> tuple[Pair, Pair]:  # noqa: ARG001 - one signature
    """The principal components (PiSSA, Meng et al. 2024, equations 2 and 3): exact, or `count` subspace iterations."""
    pair = principal(weight, rank, count)
    return pair, pair


def loftq(weight: Tensor, rank: int, rounding: Rounding, count: int) -> tuple[Pair, Pair]:
    """`count` alternating steps (LoftQ, Li et al. 2023, algorithm 1): quantize W − B·A, then B·A of what that misses.

    The steps need not improve on each other; the best one is kept.
    """
    taken = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(len(weight), rank)
    steps: list[tuple[float, Pair, Pair]] = []
    for _ in range(count):
        missed = weight - rounding(weight - taken[1] @ taken[0])
        pair = principal(missed, rank, _LOFTQ_ITERATIONS)
        steps.append(((missed - pair[1] @ pair[0]).norm().item(), pair, taken))
        taken = pair
    _, pair, taken = min(steps, key=lambda step: step[0])
    return pair, taken


def principal(weight: Tensor, rank: int, iterations: int = 0) -> Pair:
    """A (rank, d_in) and B (d_out, rank) with B·A the best approximation of that rank, its roots shared out evenly.

    iterations: of a randomised SVD (Halko et al. 2011); 0: the exact one.
    """
    if iterations:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight, min(rank + _OVERSAMPLED, *weight.shape), iterations)
        u, s, vh = u[:, :rank], s[:rank], v[:, :rank].t()
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    root = s.sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()


_OVERSAMPLED = 16
_LOFTQ_ITERATIONS = 4


def _gaussian(a: Tensor, rank: int) -> None:
    draw(a, partial(nn.init.normal_, std=1 / rank))


INITIALS = {
    "default": Initial(),
    "gaussian": Initial(redraw=_gaussian),
    "pissa": Initial(start=pissa),
    "pissa_niter": Initial(start=pissa, count=4),
    "loftq": Initial(start=loftq, count=5),
}


def get_initial(name: str) -> Initial:
    """The row called `name`, or `name_N` with a number of iterations; InputError lists the known ones."""
    match = re.fullmatch(r"(.+?)_(\d+)", name)
    row = INITIALS.get(match[1] if match else name)
    if row is None or (match and not row.count):
        raise InputError(f"unknown initialisation {name!r}: choose {', '.join(INITIALS)} (with a count: pissa_niter_8)")
    return replace(row, count=int(match[2])) if match else row


def fresh_start(init: str, original: Original | None) -> Starter:
    """Starts a layer anew, as the registry's row `init` says; `original` as in `attach_lora`."""
    row = get_initial(init)

    @torch.no_grad()
    def start(name: str, layer: LinearAdapter) -> None:
        if row.redraw is not None:
            row.redraw(layer.lora_a, layer.rank)
        if row.start is None:
            return
        if not layer.scale:
            raise InputError("alpha is 0, so that no factors can take a part of the weight: choose an alpha above 0")
        weight = _weight_before(name, layer, original)
        if layer.rank > min(weight.shape):
            raise InputError(f"rank {layer.rank} is above that of its weight: {init} takes 1 to {min(weight.shape)}")
        (a, b), taken = row.start(weight, layer.rank, layer.rounded, row.count)
        root = math.sqrt(layer.scale)
        layer.lora_a.copy_(a / root)
        layer.lora_b.copy_(b / root)
        _take(layer, init, weight, taken)

    return start


def start_again(adapter: PeftAdapter, original: Original | None) -> Starter:
    """Makes the base of a layer again as it was under an adapter that was saved; its factors are to be set then.

    Raises:
        InputError: what was taken out of the base is neither written nor can be computed again.
    """
    init = adapter.init
    if not isinstance(init, str) or not init.startswith(CHANGES_BASE):
        return fresh_start("default", None)
    if not adapter.taken and init != "pissa":
        raise InputError(f"the adapter was started with {init}, at random, and its directory does not say with what")
    if not adapter.taken:  # of peft's own making: exact, so that it can be made again
        return fresh_start(init, original)

    @torch.no_grad()
    def start(name: str, layer: LinearAdapter) -> None:
        if name not in adapter.taken:
            raise InputError(f"the adapter's {TAKEN_NAME} lacks this layer")
        taken = adapter.taken[name]
        weight = _weight_before(name, layer, original)
        _take(layer, init, weight, (taken[A_END], taken[B_END]))

    return start


def _weight_before(name: str, layer: LinearAdapter, original: Original | None) -> Tensor:
    """The weight (d_out, d_in) float32 of a layer before it was quantized."""
    if isinstance(layer, LoRALayer):
        return layer.base_to_f32().cpu()
    if original is None:
        raise InputError(
            "its base is quantized already, and this initialisation needs the weight before that: give "
            "original=…, which entrenar.original_weights(path) makes"
        )
    return original(name).float()


def _take(layer: LinearAdapter, init: str, weight: Tensor, taken: Pair) -> None:
    """Make W − B₀·A₀ the base, and remember what was taken: it is needed to make that base again."""
    a, b = taken
    if a.shape != layer.lora_a.shape or b.shape != layer.lora_b.shape:
        raise InputError(f"{TAKEN_NAME} has shapes {tuple(a.shape)} and {tuple(b.shape)} there, which do not fit")
    layer.set_base(weight - b @ a)
    layer.start, layer.taken = init, (a.contiguous(), b.contiguous())
