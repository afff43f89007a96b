"""The tensors of a base that is not in memory, read one at a time and held as an adapter was trained over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entrenar.files.peft import BaseFormat
from entrenar.files.stored_tensor import StoredTensor
from entrenar.models.experts import expert_weights
from entrenar.opening.build import build_on_meta, linear_weights
from entrenar.opening.match import match_tensors, saved_buffers
from entrenar.opening.source import ModelSource
from entrenar.quant.tensor import QuantizedTensor, quantize


@dataclass(frozen=True)
class BaseWeight:
    """A tensor as its file has it, `plain`, and as it lies quantized under the adapter, if it does."""

    plain: Tensor
    quantized: QuantizedTensor | None

    def dequantized(self) -> Tensor:
        """What the adapter was trained over."""
        return self.plain if self.quantized is None else self.quantized.dequantize()


class BaseTensors:
    """The tensors of a model's files under transformers' names.

    Args:
        format: what its linear weights are quantized to as they are read; None: they are as the files have them.

    Attributes:
        meta: the model without weights. experts: of a mixture, name → whose matrix it is. linear: weights of linear
            layers but the head, and of experts. ends: the weights of the embedding and of the head. is_tied: whether
            these are one.
    """

    def __init__(self, source: ModelSource, format: BaseFormat | None) -> None:
        self.meta = build_on_meta(source, torch.float32)
        self._stored, self._format = match_tensors(self.meta, source), format
        self._buffers, self._prequantized = saved_buffers(self.meta), source.prequantized
        self._formats = source.prequantized.formats() if source.prequantized else {}
        head = self.meta.get_output_embeddings()
        assert head is not None
        self.experts = expert_weights(self.meta, set(source.weights.names()))
        self.linear = linear_weights(self.meta, head) | self.experts.keys()
        self.ends = _weights_of(self.meta, (self.meta.get_input_embeddings(), head))
        self.is_tied = len(self.ends) == 2 and bool(self.meta.config.get_text_config().tie_word_embeddings)

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and head."""
        return int(self.meta.config.get_text_config().vocab_size)

    def names(self) -> Iterator[str]:
        """Every tensor, in the order of the files."""
        return iter(self._stored)

    def untie(self) -> None:
        """Give the head of a tied pair a tensor of its own, which is the embedding's."""
        embedding, output = self.ends
        self._stored.setdefault(output, self._stored[embedding])

    def is_prequantized(self, name: str) -> bool:
        """Whether the files have the tensor quantized."""
        return name in self._formats

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self._formats[name][1] if name in self._formats else self._stored[name].shape

    def buffer(self, name: str) -> StoredTensor | None:
        """A tensor that is a buffer of its module, which no type of output rounds; None for a parameter."""
        return self._stored[name] if name in self._buffers else None

    def plain(self, name: str) -> Tensor:
        """A tensor as its file has it; one that is quantized there is dequantized."""
        return self.weight(name).plain if name in self._formats else self._stored[name].read()

    def weight(self, name: str) -> BaseWeight:
        """A tensor as its file has it and as the adapter was trained over it."""
        if self._prequantized and name in self._formats:
            quantized = self._prequantized.weight(name).read()
            return BaseWeight(quantized.dequantize(), quantized)
        plain = self._stored[name].read()
        return BaseWeight(plain, _quantized(plain, self._format) if self._format and name in self.linear else None)


def _weights_of(model: nn.Module, parts: Sequence[nn.Module | None]) -> list[str]:
    """The names of the weights of these modules, in their order."""
    names = {id(module): name for name, module in model.named_modules()}
    return [f"{names[id(part)]}.weight" for part in parts if part is not None]


def _quantized(weight: Tensor, base: BaseFormat) -> QuantizedTensor:
    return quantize(
        weight, format=base.format, block_size=base.block_size, double_quant=base.double_quant, search=base.search
    )
