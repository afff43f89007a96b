"""Fuse without a model: each tensor is read from the base's files, adapted and handed on; nothing else is in memory.

The base is what the adapter was trained on (`dequantized`: quantized as it was then, and back), or the weights as the
files have them (`original`).
"""

from collections.abc import Iterator

from entrenar.exporting.base_tensors import BaseTensors
from entrenar.exporting.overlay import Overlay
from entrenar.files.peft import BaseFormat, PeftAdapter
from entrenar.lora.fusing import Fused
from entrenar.opening.source import ModelSource


class StreamedModel:
    """The tensors of a base with an adapter over it, made one at a time.

    Args:
        format: how the base is held under the adapter; None: as its files have it.

    Raises:
        InputError: an adapter that is not for this model.
    """

    def __init__(self, source: ModelSource, adapter: PeftAdapter | None, format: BaseFormat | None) -> None:
        self.base = BaseTensors(source, format)
        self._overlay = Overlay(self.base, adapter) if adapter else None

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and head, those of an adapter's new tokens included."""
        return self._overlay.vocabulary if self._overlay else self.base.vocabulary

    @property
    def is_untied(self) -> bool:
        """Whether the adapter has made a tied head and embedding two."""
        return self._overlay is not None and self._overlay.is_untied

    def names(self) -> Iterator[str]:
        """Every tensor, in the order of the files."""
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        shape = self.base.shape(name)
        has_rows = name in self.base.ends and not self.base.is_prequantized(name)
        return (self.vocabulary, *shape[1:]) if has_rows else shape

    def is_adapted(self, name: str) -> bool:
        """Whether the tensor is the weight of an adapted layer."""
        return self._overlay is not None and self._overlay.layer(name) is not None

    def fused(self, name: str) -> Fused:
        """One tensor."""
        return self._overlay.fused(name) if self._overlay else Fused(self.base.weight(name).dequantized(), None)
