"""A GGUF's tensors as transformers has them: its names, its order of rows, its values."""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PretrainedConfig

from entrenar.files.stored_tensor import StoredTensor
from entrenar.gguf.families import Family, has_bias
from entrenar.gguf.rope import ROPE_TENSORS, head_dim
from entrenar.gguf.split import GGUFModel


class GGUFWeights:
    """The tensors of a GGUF under transformers' names, and with the values and in the row order they have there."""

    def __init__(self, file: GGUFModel, config: PretrainedConfig, family: Family) -> None:
        self._file = file
        self._config = config
        self._family = family
        # A tensor the family does not have keeps its own name, and so is reported as unexpected.
        weights = [name for name in file.tensors if name not in ROPE_TENSORS]
        self._names = {family.hf_name(name) or name: name for name in weights}
        self._zeros = _absent_biases(config, family, file)

    def names(self) -> Iterable[str]:
        """Every tensor, by its transformers name."""
        return self._names | self._zeros

    def stored(self, name: str) -> StoredTensor:
        """Where one tensor lies; read, it is dequantized and as transformers has it."""
        if name in self._zeros:
            return self._zeros[name]
        values = self._in_our_order(name, self._file.stored(self._names[name]))
        offset = self._family.offset(name)
        if not offset:
            return values
        # In float32: of a norm that is stored in 16 bits, 1 taken off in those would cost what lies beside the 1.
        return replace(values, dtype=torch.float32, decode=lambda raw: values.decode(raw).float() - offset)

    def blocks(self, name: str) -> StoredTensor:
        """The same tensor's bytes as they stand, in transformers' row order: (..., bytes of a row) uint8."""
        return self._in_our_order(name, self._file.blocks(self._names[name]))

    @property
    def raw_metadata(self) -> dict[str, bytes]:
        """The file's keys as they stand in it."""
        return self._file.raw_metadata

    def type_of(self, name: str) -> str:
        """The type those bytes are of: `q4_k`, `f16`, …"""
        return self._file.tensors[self._names[name]].type.name.lower()

    def _in_our_order(self, name: str, stored: StoredTensor) -> StoredTensor:
        """Rows of q and k reordered: whole rows, so that it does not matter what they are held as."""
        if not self._family.reorders(name):
            return stored
        columns = stored.shape[1:]

        def decode(raw: Tensor) -> Tensor:
            return self._family.in_our_order(stored.decode(raw).view(-1, *columns), self._config).view(-1)

        return replace(stored, decode=decode, group=head_dim(self._config) * math.prod(columns))


def _absent_biases(config: PretrainedConfig, family: Family, file: GGUFModel) -> dict[str, StoredTensor]:
    """Zeros for the biases that a transformers class has and a file has not: llama.cpp adds each where there is one."""
    zeros: dict[str, StoredTensor] = {}
    for name in list(file.tensors):
        bias = f"{name.removesuffix('weight')}bias"
        hf_name = family.hf_name(bias) if name.endswith(".weight") else None
        if bias in file.tensors or hf_name is None or not has_bias(config, bias):
            continue
        rows = file.tensors[name].shape[0]
        stored = file.stored(name)
        zeros[hf_name] = replace(
            stored, size=0, shape=(rows,), dtype=torch.float32, decode=partial(_zeros, rows), group=1
        )
    return zeros


def _zeros(count: int, raw: Tensor) -> Tensor:
    del raw
    return torch.zeros(count)
