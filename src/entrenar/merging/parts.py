"""The parts of a merge (a slice, or all of the models), and what of their models would not come into the result.

A tensor that only some models have cannot be merged; where every layer is taken from every model that is an error, and
what a choice of layers leaves behind outside of them is told.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from entrenar.core.errors import InputError, listing
from entrenar.merging.models import InputModel
from entrenar.merging.names import shown_names
from entrenar.merging.settings import Level

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed", "wte", "wpe")


@dataclass(frozen=True)
class Part:
    """One slice with its models opened: (model, first layer, its levels), the base apart."""

    models: list[tuple[InputModel, int, list[Level]]]
    base: tuple[InputModel, int] | None
    shared: list[Level]
    length: int
    unread: list[Level]  # parameters of the base

    @property
    def reference(self) -> tuple[InputModel, int]:
        """The model whose tensors are to be there: the base, or the first."""
        return self.base or self.models[0][:2]


def is_embedding(name: str) -> bool:
    """Whether a tensor outside of the layers comes from the first slice."""
    return any(word in name for word in _EMBEDDINGS)


def check_nothing_is_lost(parts: Sequence[Part]) -> None:
    """InputError for a tensor that a model has and the reference of its part lacks: nobody would miss it."""
    for part in parts:
        reference, begin = part.reference
        wanted = _kinds(reference, begin, part.length)
        whole = len(parts) == 1 and part.length == reference.layers
        for model, first, _ in part.models:
            extra = _kinds(model, first, part.length) - wanted
            if whole:
                extra |= {name for name in model.outside if name != HEAD} - set(reference.outside)
            if extra:
                raise InputError(
                    f"{model.label} has {len(extra)} tensor{'s' if len(extra) > 1 else ''} that {reference.label} has "
                    f"not ({listing(sorted(extra), 3)}): they would be lost; merge models of one kind"
                )


def _kinds(model: InputModel, begin: int, length: int) -> set[str]:
    """Of the layers [begin, begin + length), each with its number in the part."""
    return {
        f"{before}{index - begin}{after}"
        for before, index, after in model.by_layer.places.values()
        if begin <= index < begin + length
    }


def told_of_losses(models: Mapping[str, InputModel], parts: Sequence[Part], result: AbstractSet[str]) -> list[str]:
    """A sentence for every model of which something outside of its layers is not in the result."""
    used = {model.label for part in parts for model, *_ in part.models} | {part.reference[0].label for part in parts}
    remarks = [
        f"{level.where}: the base model's parameters ({', '.join(level.values)}) count for nothing, as in mergekit"
        for part in parts
        for level in part.unread
    ]
    shown = shown_names(models)
    for label, model in models.items():
        lost = [name for name in model.outside if name not in result and name != HEAD] if label in used else []
        lost += model.left_out
        if lost:
            remarks.append(
                f"of {shown[label]}, outside of the layers that were chosen, {len(lost)} "
                f"{'tensors are' if len(lost) > 1 else 'tensor is'} not in the result: {listing(lost, 3)}"
            )
    return remarks
