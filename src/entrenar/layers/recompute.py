"""What is computed again in a backward rather than saved.

A norm's result, or a gated activation's, is one pass over memory away from tensors that are saved anyway. It carries a
recipe, and a layer that would save it for its backward saves the recipe's inputs instead (those same tensors).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from entrenar.core.attachment import Attachment


class Recompute(Enum):
    """What a decoder layer computes again in its backward, in place of saving it beside its input."""

    NOTHING = "nothing"
    CHEAP = "cheap"  # norms and activations; the results of products are saved
    ALL = "all"


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
