"""Tensors that are cheaper to make again than to keep.

A norm's result, or a gated activation's, is a pass over memory away from tensors that are kept anyway. It carries a
recipe, and a layer that would keep it for its backward keeps the recipe's inputs instead (those same tensors).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from entrenar.core.attachment import Attachment


@dataclass(frozen=True)
class Recipe:
    """make(*inputs) gives the tensor again, to the same bits."""

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


_RECIPE = Attachment[Recipe]("recipe")


def with_recipe(tensor: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The tensor itself, marked."""
    _RECIPE.hang(tensor, Recipe(make, inputs))
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The tensor's recipe, if it has one."""
    return _RECIPE.of(tensor)
