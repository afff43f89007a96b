"""The tiny model as a GGUF; a Llama that changes its logits; a recorder of the tensors that a piece of code makes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import make_gguf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, PreTrainedModel

__all__ = ["make_gguf"]


class BentLlama(LlamaForCausalLM):
    """A Llama that does `bend` to its logits."""

    bend: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        assert output.logits is not None
        output.logits = self.bend(output.logits)
        return output


@pytest.fixture
def bent(tiny_model_dir: Path) -> Callable[[Callable[[Tensor], Tensor]], PreTrainedModel]:
    """The tiny Llama with a function behind its head."""

    def make(bend: Callable[[Tensor], Tensor]) -> PreTrainedModel:
        model = BentLlama.from_pretrained(tiny_model_dir)
        model.bend = bend
        return model

    return make


class Recorder(TorchDispatchMode):
    """The bytes of every new storage that operations make, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        self.sizes += [storage.nbytes() for storage in _storages(result) if storage.data_ptr() not in given]
        self.products += func.overloadpacket in {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}
        return result


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.fixture
def recorder() -> Callable[[], Recorder]:
    """Makes context managers that note the `sizes` of new tensors and count matrix `products`."""
    return Recorder
