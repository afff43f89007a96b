"""Tensors from files into sinks, piece by piece, on several threads: some read while others compute.

Every thread takes a piece through all of its work (read, decode, sink) alone. The alternative, one reader and each
piece's work shared out among OpenMP's threads, waits at the end of every piece for the last of them.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from entrenar.files.stored_tensor import StoredTensor

MAX_THREADS = 8  # more only wait for the disk and for memory
_TENSORS_AHEAD = 2


class Sink(Protocol):
    """Takes a tensor that comes in pieces."""

    def take(self, start: int, piece: Tensor) -> None:
        """The elements from `start`, flat, valid during the call; in any order and from several threads at once."""
        ...


AnySink = TypeVar("AnySink", bound=Sink)


def stream(tensors: Sequence[StoredTensor], sinks: Iterable[AnySink]) -> Generator[AnySink]:
    """Read tensors on several threads, each into its sink; yield the sinks in order, each once its tensor is complete.

    Close the generator if it is not exhausted. A sink is taken from `sinks` only when reading its tensor begins, so few
    exist at once; of the files one piece a thread is in memory.

    Raises:
        InputError: a file cannot be read, ends early, or is another than when its header was read.
    """
    with one_openmp_thread_each() as computing:
        count = computing + 1  # one more keeps the disk busy
        largest = max((tensor.piece_bytes for tensor in tensors), default=0)
        buffers: SimpleQueue[Tensor] = SimpleQueue()
        # Made here: what a thread takes from malloc comes from an arena of its own and stays there.
        for _ in range(count):
            buffers.put(torch.empty(largest, dtype=torch.uint8))
        pool = ThreadPoolExecutor(count, thread_name_prefix="stream")
        try:
            waiting: deque[tuple[AnySink, list[Future[None]]]] = deque()
            for tensor, sink in zip(tensors, sinks, strict=True):
                pieces = [pool.submit(_carry, tensor, start, sink, buffers) for start in tensor.starts()]
                waiting.append((sink, pieces))
                if len(waiting) > _TENSORS_AHEAD:
                    yield _complete(*waiting.popleft())
            while waiting:
                yield _complete(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _complete(sink: AnySink, pieces: list[Future[None]]) -> AnySink:
    for piece in pieces:
        piece.result()
    return sink


def _carry(tensor: StoredTensor, start: int, sink: Sink, buffers: SimpleQueue[Tensor]) -> None:
    """One piece of a tensor from its file to its sink."""
    buffer = buffers.get()
    try:
        with torch.inference_mode(buffer.is_inference()):  # the caller's mode, which a thread does not inherit
            sink.take(start, tensor.read_piece(start, buffer))
    finally:
        buffers.put(buffer)


@contextmanager
def one_openmp_thread_each() -> Iterator[int]:
    """Threads made inside do their work alone; yields how many of them the machine computes with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(before, MAX_THREADS)
    finally:
        torch.set_num_threads(before)
