"""The weights of a model as its files have them, one at a time: what initialisations of adapters begin from."""

from collections.abc import Callable
from functools import cache

from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.opening.source import ModelSource, open_source


def original_weights(path: str) -> Callable[[str], Tensor]:
    """A layer's name → its weight (d_out, d_in), read from the model at `path` each time it is asked for.

    Raises:
        InputError: as `open_source`; then for a layer that the model does not have.
    """
    opened = cache(lambda: weights_of(open_source(path, with_tokenizer=False)))  # most adapters never ask
    return lambda layer: opened()(layer)


def weights_of(source: ModelSource) -> Callable[[str], Tensor]:
    """The same for an open source."""
    names = set(source.weights.names())

    def read(layer: str) -> Tensor:
        if f"{layer}.weight" not in names:
            raise InputError(f"{source.path} has no {layer}.weight: give the model that the adapted one was made of")
        if source.prequantized and f"{layer}.weight" in source.prequantized.formats():
            raise InputError(f"{source.path} holds {layer}.weight quantized alone: give the model it was made of")
        return source.weights.stored(f"{layer}.weight").read()

    return read
