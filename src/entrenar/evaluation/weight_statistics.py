"""What a text says about a model's weights, for merging: squared gradients (Fisher) and products of inputs (RegMean).

Statistics are as large as the weights or larger, so they are made a group at a time, one run over the text for each,
and handed on to be written before the next.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.files.lazy_tensor import LazyTensor
from entrenar.models.forward import target_loss

GROUP_BYTES = 1 << 30  # of statistics that are in memory at once
# Names → their statistics, in one run over the text.
_Run = Callable[[Sequence[str]], Mapping[str, Tensor]]


def squared_gradients(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[LazyTensor]:
    """The diagonal of the empirical Fisher information (Matena and Raffel 2022, section 3.2).

    Args:
        rows: token ids (T,) each.
    Returns:
        For every parameter under its transformers name, in its shape, float32: the mean over the rows of the squared
        gradient of a row's mean loss in nats per token.
    """
    parameters = dict(model.named_parameters())

    def run(names: Sequence[str]) -> dict[str, Tensor]:
        chosen = {name: parameters[name].requires_grad_() for name in names}
        totals = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in chosen.items()}
        try:
            for ids in rows:
                _mean_loss(model, ids).backward()
                for name, parameter in chosen.items():
                    if parameter.grad is not None:
                        totals[name] += parameter.grad.float().square() / len(rows)
                        parameter.grad = None
        finally:
            model.requires_grad_(False)
        return totals

    return _in_groups({name: tuple(parameter.shape) for name, parameter in parameters.items()}, run)


def _mean_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    positions = torch.arange(len(ids))[None]
    return target_loss(model, ids[None], positions, positions > 0) / (len(ids) - 1)


@torch.no_grad()
def input_products(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[LazyTensor]:
    """XᵀX of the inputs X of every linear layer (RegMean, Jin et al. 2023, section 3.2), a mean over the tokens.

    Args:
        rows: token ids (T,) each.
    Returns:
        For the weight of every nn.Linear under its transformers name: (in_features, in_features) float32.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    leaders = _shared_inputs(model, modules, rows[0])
    tokens = sum(map(len, rows))

    @torch.no_grad()
    def run(names: Sequence[str]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}

        def add(name: str, x: Tensor) -> None:
            x = x.flatten(0, -2).float()
            totals[name] = totals[name].addmm_(x.t(), x) if name in totals else x.t() @ x

        with _watching({leaders[name]: modules[leaders[name]] for name in names}, add):
            for ids in rows:
                model(input_ids=ids[None].to(model.device), use_cache=False)
        return {name: totals[leaders[name]] / tokens for name in names}

    matrices = _in_groups({name: (modules[name].in_features,) * 2 for name in leaders}, run)
    return [LazyTensor(f"{tensor.name}.weight", tensor.shape, tensor.make) for tensor in matrices]


@contextmanager
def _watching(modules: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `note` with the name and the input of each of the modules whenever it runs."""

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        note(name, args[0])

    hooks = [module.register_forward_pre_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _shared_inputs(model: PreTrainedModel, modules: Mapping[str, nn.Linear], ids: Tensor) -> dict[str, str]:
    """Layer → the first layer that is given the very same tensor, as q, k and v are; layers that do not run are left
    out."""
    leaders: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []

    def note(name: str, x: Tensor) -> None:
        if not last or last[0][0] is not x:
            last[:] = [(x, name)]
        leaders[name] = last[0][1]

    with _watching(modules, note):
        model(input_ids=ids[None, :2].to(model.device), use_cache=False)
    return leaders


def _in_groups(shapes: Mapping[str, tuple[int, ...]], run: _Run) -> list[LazyTensor]:
    """Float32 tensors of these names and shapes, in their order; the first of a group to be made runs for all of it."""
    group_tensors: dict[str, Tensor] = {}
    group_of: dict[str, tuple[str, ...]] = {}
    for group in _grouped(shapes):
        group_of |= dict.fromkeys(group, group)

    def make(name: str) -> Tensor:
        if name not in group_tensors:
            group_tensors.clear()
            group_tensors.update(run(group_of[name]))
        return group_tensors.pop(name)

    return [LazyTensor(name, shape, partial(make, name)) for name, shape in shapes.items()]


def _grouped(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[tuple[str, ...]]:
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        bytes_of_one = 4 * torch.Size(shape).numel()
        if group and size + bytes_of_one > GROUP_BYTES:
            yield tuple(group)
            group, size = [], 0
        group.append(name)
        size += bytes_of_one
    if group:
        yield tuple(group)
