"""The files of a result that is being written: made at their final size, filled at their final offsets."""

import os
from pathlib import Path

import torch
from torch import Tensor

from entrenar.files.safetensors import Layout, layout, shard_names, split_shards, write_index
from entrenar.merging.place import disk_full, is_own_file
from entrenar.merging.plan import PlannedTensor


class OutputFiles:
    """`model.safetensors`, or shards with their index, in a working directory.

    Args:
        metadata: goes into the header of every file.
    """

    def __init__(
        self, directory: Path, tensors: list[PlannedTensor], max_shard_bytes: int, metadata: dict[str, str]
    ) -> None:
        self.directory = directory
        shards = split_shards(tensors, [tensor.bytes for tensor in tensors], max_shard_bytes)
        self.names = shard_names(len(shards))
        self.layouts: list[Layout] = [
            layout(((tensor.name, tensor.shape, tensor.dtype) for tensor in shard), metadata) for shard in shards
        ]
        self._places = {
            tensor.name: (index, self.layouts[index].starts[tensor.name])
            for index, shard in enumerate(shards)
            for tensor in shard
        }
        self._files: list[int] = []

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(one.size for one in self.layouts)

    def are_there(self) -> bool:
        """Whether files of these sizes lie in the directory."""
        paths = (self.directory / name for name in self.names)
        return all(
            is_own_file(path) and path.stat().st_size == one.size for path, one in zip(paths, self.layouts, strict=True)
        )

    def open(self) -> None:
        """Make the files with all of their space, or open those that are there; EntrenarError if the disk is full."""
        for name, one in zip(self.names, self.layouts, strict=True):
            with disk_full(self.directory / name):
                file = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
                self._files.append(file)
                os.posix_fallocate(file, 0, one.size)
                os.pwrite(file, one.header, 0)

    def write(self, name: str, start: int, piece: Tensor) -> None:
        """Put the elements from `start` of a tensor into its place; from any thread."""
        index, offset = self._places[name]
        left = piece.view(torch.uint8).numpy().data
        offset += start * piece.element_size()
        with disk_full(self.directory / self.names[index]):
            while left:
                count = os.pwrite(self._files[index], left, offset)
                left, offset = left[count:], offset + count

    def flush(self, names: list[str]) -> None:
        """Bring what was written of these tensors to the disk."""
        for index in {self._places[name][0] for name in names}:
            with disk_full(self.directory / self.names[index]):
                os.fdatasync(self._files[index])

    def finish(self) -> None:
        """Flush and close everything, and write the index of shards."""
        for name, file in zip(self.names, self._files, strict=True):
            with disk_full(self.directory / name):
                os.fsync(file)
        if len(self.names) > 1:
            weight_map = {name: self.names[index] for name, (index, _) in self._places.items()}
            write_index(self.directory, weight_map, sum(one.size - len(one.header) for one in self.layouts))
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)
        self._files = []
