"""A recorder of the tensors that a piece of code makes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
