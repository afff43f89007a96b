"""Weights that stay in a model as its files have them: all of a prequantized checkpoint's, and with `keep` a GGUF's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from entrenar.core.errors import InputError, listing
from entrenar.files.stored_tensor import StoredTensor
from entrenar.gguf.reader import is_decoded
from entrenar.opening.build import embedding_weights, linear_weights
from entrenar.opening.source import ModelSource
from entrenar.ops.linear.gguf import FLOAT_TYPES
from entrenar.quant.registry import AS_STORED_FORMATS

UNQUANTIZED, AS_STORED = "none", "keep"  # the values of `quantize` that are no number format


@dataclass(frozen=True)
class WeightAsStored:
    """A weight that is not quantized again.

    Attributes:
        format: a row of quant/registry.py.
        count_bytes: says what it takes in memory; InputError where it is broken.
        blocks: where a GGUF has it, read piece by piece with the plain tensors; None: its checkpoint's reader reads it
            whole.
    """

    format: str
    count_bytes: Callable[[], int]
    blocks: StoredTensor | None = None


def weights_as_stored(
    model: PreTrainedModel, source: ModelSource, quantize: str, dtype: torch.dtype
) -> dict[str, WeightAsStored]:
    """Parameter → what it stays as, given what was asked for and the compute dtype; `model` may be on `meta`.

    Raises:
        InputError: the source is quantized in another format than `quantize`, which would quantize it twice; or
            `quantize` is `keep` and it is no GGUF, or one that holds a matrix in a type that is not known.
    """
    if source.prequantized is not None:
        formats = source.prequantized.formats()
        others = sorted({format for format, _ in formats.values()} - {quantize})
        if others and quantize != UNQUANTIZED:
            raise InputError(
                f"{source.path} is quantized as {listing(others)} already: set quantize to that or to none to hold it "
                "so"
            )
        count = source.prequantized.bytes_of
        return {name: WeightAsStored(format, partial(count, name)) for name, (format, _) in formats.items()}
    return _gguf_weights(model, source, dtype) if quantize == AS_STORED else {}


def _gguf_weights(model: PreTrainedModel, source: ModelSource, dtype: torch.dtype) -> dict[str, WeightAsStored]:
    """Matrices of linear layers and the embedding; those that are of the compute dtype are ordinary parameters."""
    if source.gguf is None:
        raise InputError(
            f"quantize: keep holds a GGUF's own blocks, but {source.path} is not a .gguf file: choose nf4, another "
            "format or none"
        )
    names = linear_weights(model, None) | embedding_weights(model)
    types = {name: source.gguf.type_of(name) for name in names & set(source.gguf.names())}
    for name, type in types.items():
        _check_type(f"{source.path}: {name} is {type}", type)
    return {
        name: WeightAsStored(type, lambda size=blocks.size: size, blocks)
        for name, type in types.items()
        if FLOAT_TYPES.get(type) != dtype
        for blocks in (source.gguf.blocks(name),)
    }


def _check_type(what: str, type: str) -> None:
    if type in AS_STORED_FORMATS:
        return
    known = ", ".join(AS_STORED_FORMATS)
    if is_decoded(type):
        raise InputError(
            f"{what}, which is not kept as it is (kept are {known}): set quantize to none, nf4 or another format, "
            "which decode it"
        )
    raise InputError(f"{what}, which is not read: allowed are {known}")
