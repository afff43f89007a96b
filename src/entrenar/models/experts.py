"""Mixtures of experts: transformers keeps the experts of a layer as 3-D parameters, files keep them one by one.

Here they are one by one too, quantized like any linear layer (layers/quantized_experts.py), in a module that takes
the place of transformers' own where it agrees with it on one expert.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.layers.adapted_linear import adapted_linears
from entrenar.layers.quantized_experts import ExpertProjection, ExpertStack
from entrenar.layers.quantized_linear import in_compute_dtype
from entrenar.models.acceleration.agreement import agree, only_match, sample
from entrenar.models.acceleration.proxy import ModuleProxy
from entrenar.models.acceleration.recognised import activation_kind
from entrenar.ops.elementwise.gated_activation import gated_activation
from entrenar.quant.tensor import QuantizedTensor

PROJECTIONS = ("gate_up_proj", "down_proj")
_ROLES = ("gate", "up", "down")
# What files call an expert's gate, up and down, and the block that the experts are in where they have another name.
_NAMINGS = ((".mlp.", ("gate_proj", "up_proj", "down_proj")), (".block_sparse_moe.", ("w1", "w3", "w2")))
_OPTIONS = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True,
            "has_post_expert_norm": False}  # fmt: skip


@dataclass(frozen=True)
class ExpertWeight:
    """One matrix of one expert in a file: of the module at `path`, (d_out, d_in)."""

    path: str
    role: str
    index: int
    shape: tuple[int, int]

    @property
    def projection(self) -> str:
        """The layer whose adapter is for it, by its full name."""
        return f"{self.path}.{PROJECTIONS[self.role == 'down']}"


def expert_weights(model: PreTrainedModel, have: set[str]) -> dict[str, ExpertWeight]:
    """Name in the files, which have the tensors `have` → the expert's matrix; empty for a model without a mixture."""
    weights: dict[str, ExpertWeight] = {}
    for path, module in expert_modules(model).items():
        count, both, hidden = module.gate_up_proj.shape
        shapes = {"gate": (both // 2, hidden), "up": (both // 2, hidden), "down": (hidden, both // 2)}
        names = [_named(path, block, leaves) for block, leaves in _NAMINGS]
        named = next((name for name in names if name(0, "gate") in have), names[0])
        weights |= {
            named(index, role): ExpertWeight(path, role, index, shapes[role])
            for index in range(count)
            for role in _ROLES
        }
    return weights


def _named(path: str, block: str, leaves: tuple[str, ...]) -> Callable[[int, str], str]:
    there = f"{path}.".replace(".mlp.", block)
    return lambda index, role: f"{there}{index}.{leaves[_ROLES.index(role)]}.weight"


def file_name(name: str, have: set[str]) -> str:
    """What files that have the tensors `have` call a parameter: transformers has renamed Mixtral's blocks."""
    other = name.replace(".mlp.", _NAMINGS[1][0])
    return other if name not in have and other in have else name


def parameter_name(name: str) -> str:
    """The reverse."""
    return name.replace(_NAMINGS[1][0], ".mlp.")


def expert_modules(model: nn.Module) -> dict[str, Any]:
    """Path → module that holds its experts as 3-D parameters of the kind known here."""
    return {path: module for path, module in model.named_modules() if _holds_experts(module)}


def _holds_experts(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    known = all(getattr(module, name, value) is value for name, value in _OPTIONS.items())
    return known and parameters.keys() == set(PROJECTIONS) and all(p.dim() == 3 for p in parameters.values())


class Experts(nn.Module):
    """The experts of one layer: each token goes through the few that its router chose.

    Args:
        gate, up, down: of every expert. act_fn: the gate's activation.
    """

    def __init__(self, gate: ExpertStack, up: ExpertStack, down: ExpertStack, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = ExpertProjection(gate, up), ExpertProjection(down)
        self.num_experts, self.act_fn, self._kind = gate.count, act_fn, activation_kind(act_fn)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of the chosen experts' results by their weights.

        Args:
            hidden_states: (N, H). top_k_index: (N, k) int64, one that is not below the number of experts: none.
            top_k_weights: (N, k) float.
        Returns:
            (N, H).
        """
        total = torch.zeros_like(hidden_states)
        first, second = (cast(Any, layer).members() for layer in (self.gate_up_proj, self.down_proj))
        x = in_compute_dtype(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            tokens, places = torch.where(top_k_index == expert)
            gate, up = adapted_linears(x[tokens], first[expert])
            (y,) = adapted_linears(self._activated(gate, up), second[expert])
            total.index_add_(0, tokens, (y * top_k_weights[tokens, places, None]).to(total.dtype))
        return total

    def _activated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up if self._kind is None else gated_activation(gate, up, self._kind)


class ExpertsBuilder:
    """Gathers the matrices of a model's experts and puts a module in its place once it has all of its own."""

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, ExpertWeight]) -> None:
        self._model, self._weights = model, weights
        self._gathered: dict[str, dict[tuple[str, int], Any]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def take(self, name: str, weight: Tensor | QuantizedTensor) -> None:
        """The matrix that the files call `name`.

        Raises:
            InputError: with the last one of a module: transformers' own gives other numbers.
        """
        place = self._weights[name]
        matrices = self._gathered.setdefault(place.path, {})
        matrices[place.role, place.index] = weight
        original: Any = self._model.get_submodule(place.path)
        count = len(original.gate_up_proj)
        if len(matrices) == len(_ROLES) * count:
            stacks = [ExpertStack([matrices[role, index] for index in range(count)]) for role in _ROLES]
            del self._gathered[place.path]
            experts = Experts(stacks[0], stacks[1], stacks[2], original.act_fn)
            if not _agrees(experts, original):
                raise InputError(f"{type(original).__name__} does not compute as mixtures known here do")
            parent, _, child = place.path.rpartition(".")
            setattr(self._model.get_submodule(parent), child, experts)


def _agrees(ours: Experts, original: nn.Module) -> bool:
    """Whether both compute the same: on planted weights in float64, every element, and on the first expert's own."""
    try:
        return _agree_planted(ours, original) and _agree_on_the_first(ours, original)
    except Exception:  # its forward asks for what mixtures known here do not have
        return False


@torch.no_grad()
def _agree_planted(ours: Experts, original: nn.Module) -> bool:
    """Over three small experts whose gates and ups reach where activations are told apart, and where some are clipped.

    The first hypothesis must be the outcome: gate before up, not the reverse, not row by row in turns.
    """
    generator = torch.Generator().manual_seed(0)

    def planted(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inner, hidden, tokens = 12, 6, 64
    gate, up, down = planted(3, inner, hidden), planted(3, inner, hidden) * 2, planted(3, hidden, inner)
    x = planted(tokens, hidden) * torch.logspace(-1, 4, tokens, dtype=torch.float64)[:, None]
    index = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    share = planted(tokens, 2)
    expected = _their_forward(original, ours, torch.cat((gate, up), dim=1), down)(x, index, share)
    turns = torch.stack((gate, up), dim=2).flatten(1, 2)  # gate, up, gate, up, …
    pairs = [(gate, up), (up, gate), (turns[:, :inner], turns[:, inner:])]
    outcomes = []
    for first, second in pairs:
        stacks = [ExpertStack(list(weights)) for weights in (first, second, down)]
        tried = Experts(stacks[0], stacks[1], stacks[2], ours.act_fn)
        outcomes.append(tried(x, index, share))
    floor = 1e-9 * float(expected.abs().max(dim=-1).values.min())
    return only_match(expected, outcomes, floor) == 0


@torch.no_grad()
def _agree_on_the_first(ours: Experts, original: nn.Module) -> bool:
    """Whether both give the same for the first expert, its weights dequantized for transformers' own."""
    gate, up, down = (stack for layer in (ours.gate_up_proj, ours.down_proj) for stack in layer.each())
    dtype = torch.float32 if gate.is_quantized else gate.get_parameter("weight").dtype
    device = next(ours.parameters()).device
    weights = [stack.to_f32(0).to(dtype) for stack in (gate, up, down)]
    x = sample(gate.d_in, torch.empty(0, dtype=dtype, device=device))
    index = torch.zeros(len(x), 1, dtype=torch.int64, device=device)
    share = torch.full((len(x), 1), 0.5, dtype=dtype, device=device)
    expected = _their_forward(original, ours, torch.cat(weights[:2])[None], weights[2][None])(x, index, share)
    return agree(ours(x, index, share), expected)


def _their_forward(original: nn.Module, ours: Experts, both: Tensor, down: Tensor) -> Callable[..., Tensor]:
    """The class's own forward over other weights; its parameters are on no device yet."""
    forward = inspect.unwrap(type(original).forward)
    proxy = ModuleProxy(original, num_experts=len(down), act_fn=ours.act_fn, gate_up_proj=both, down_proj=down)
    return partial(forward, cast(Any, proxy))
