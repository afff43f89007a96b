"""Carry out a plan: every thread takes whole tensors, piece by piece from the files into the files.

A tensor is one thread's work from its statistics to its last piece, so no thread waits for another, the order of
threads decides nothing, and what is held is a few pieces a thread. While tensors are merged the main thread flushes
those that are done and notes them in the journal: a merge that was killed goes on with the others and ends with the
same bytes.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from entrenar.core.atomic import remove_tree
from entrenar.core.errors import EntrenarError, InputError
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stream import one_openmp_thread_each
from entrenar.merging.journal import NAME as JOURNAL
from entrenar.merging.journal import Journal, Note
from entrenar.merging.models import StoredReader
from entrenar.merging.output import OutputFiles
from entrenar.merging.place import clear, commit, disk_full, own_directory, working_directory
from entrenar.merging.plan import MergePlan, PlannedTensor
from entrenar.merging.stack import PIECE_ELEMENTS, Piece, Scratch, Stack, TensorReader
from entrenar.ops.merge.masks import count_non_finite
from entrenar.ops.merge.sums import add_gram

Progress = Callable[[int, int], None]
"""(bytes of the result that are done, bytes in all)."""

Measured = Mapping[str, SafetensorsCheckpoint]
"""Model → what was measured of it, a tensor for each of its weights that the method asks about."""

SAMPLE = 1 << 14  # elements of every piece that the report looks at


@contextmanager
def working(output: Path) -> Iterator[Path]:
    """The working directory, renamed to `output` in the end; kept on an error that another run can go on from.

    The caller holds the output's lock. Raises InputError when something else stands in its place.
    """
    with disk_full(output):
        directory = own_directory(working_directory(output))
        try:
            yield directory
        except InputError:
            remove_tree(directory)  # another run would be refused as well
            raise
        (directory / JOURNAL).unlink()
        commit(directory, output)


def execute(
    plan: MergePlan, files: OutputFiles, digest: str, seed: int, progress: Progress, measured: Measured | None = None
) -> dict[str, Note]:
    """Write every tensor that is not there yet; tensor → its numbers for the report (see `_Watch`).

    Args:
        digest: of everything that decides the bytes; what lies in the directory under another one is removed.
        measured: for a method that asks for statistics.

    Raises:
        InputError: an input that is not finite, has changed, or ends early. EntrenarError: the disk is full.
    """
    journal = Journal(files.directory)
    try:
        sizes = {tensor.name: len(tensor.models) + 1 for tensor in plan.tensors}
        done = journal.read(digest, sizes) if files.are_there() else {}
        clear(files.directory, keep=(JOURNAL, *(files.names if done else ())))
        journal.start(digest, done)
        _open(files, is_new=not done)
        _merge_all(plan, files, journal, seed, progress, done, measured or {})
        files.finish()
        return done
    finally:
        files.close()
        journal.close()


def _open(files: OutputFiles, *, is_new: bool) -> None:
    try:
        files.open()
    except EntrenarError:
        if is_new:
            clear(files.directory, keep=(JOURNAL,))  # a full disk's last space is given back
        raise


def _merge_all(
    plan: MergePlan, files: OutputFiles, journal: Journal, seed: int, progress: Progress, done: dict[str, Note],
    measured: Measured,
) -> None:  # fmt: skip
    left = sorted((tensor for tensor in plan.tensors if tensor.name not in done), key=lambda t: -t.bytes)
    sizes = {tensor.name: tensor.bytes for tensor in plan.tensors}
    if done:
        progress(sum(sizes[name] for name in done), sum(sizes.values()))
    local = threading.local()

    def merge(tensor: PlannedTensor) -> tuple[str, Note]:
        if not hasattr(local, "scratch"):
            local.scratch = Scratch()
        with torch.inference_mode():
            return tensor.name, merge_tensor(plan, tensor, files, seed, local.scratch, measured)

    with one_openmp_thread_each() as count:
        # No thread more to read while these compute, as files/stream.py has: from the page cache it costs 8%, from a
        # disk it gains 4%.
        pool = ThreadPoolExecutor(count, thread_name_prefix="merge")
        try:
            waiting: set[Future[tuple[str, Note]]] = {pool.submit(merge, tensor) for tensor in left}
            while waiting:
                complete, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                notes = [future.result() for future in complete]
                files.flush([name for name, _ in notes])
                journal.append(notes)
                done.update(notes)
                progress(sum(sizes[name] for name in done), sum(sizes.values()))
        finally:
            pool.shutdown(cancel_futures=True)


def merge_tensor(
    plan: MergePlan, tensor: PlannedTensor, files: OutputFiles, seed: int, scratch: Scratch, measured: Measured
) -> Note:
    """Merge and write one tensor; its numbers for the report."""
    method = plan.method
    if not tensor.dtype.is_floating_point:
        return _copy_buffer(tensor, files, scratch)
    stack = Stack(
        name=tensor.name, shape=tensor.shape, models=[model.source for model in tensor.models],
        base=tensor.base.source if tensor.base else None, labels=tensor.labels, scratch=scratch, seed=seed,
        whole_rows=method.whole_rows,
        statistics=[_measured_source(measured, *where) for where in zip(tensor.labels, tensor.names, strict=True)],
    )  # fmt: skip
    combine = method.function(stack, tensor.options)
    watch = _Watch(tensor)
    for piece in stack.pieces():
        watch.check_inputs(piece)
        out = scratch.take("out", piece.count, tensor.dtype)
        combine(piece, out)
        watch.look_at(piece, out)
        files.write(tensor.name, piece.start, out)
    return watch.note()


def _copy_buffer(tensor: PlannedTensor, files: OutputFiles, scratch: Scratch) -> Note:
    """Integers and truth values say which, not how much: they are copied, and have to be the same in every model."""
    labels = [*tensor.labels, "the base model"]
    first, *others = [one.source for one in (*tensor.models, *([tensor.base] if tensor.base else []))]
    assert isinstance(first, StoredReader)
    for start in range(0, tensor.numel, PIECE_ELEMENTS):
        count = min(PIECE_ELEMENTS, tensor.numel - start)
        piece = first.raw(start, count, scratch, 0)
        for label, other in zip(labels[1:], others, strict=False):
            if not isinstance(other, StoredReader) or not torch.equal(other.raw(start, count, scratch, 1), piece):
                raise InputError(
                    f"{tensor.name} holds {str(tensor.dtype).removeprefix('torch.')} values that differ between "
                    f"{labels[0]} and {label}, and such values are not merged: remove it from one"
                )
        files.write(tensor.name, start, piece)
    return [[0.0] * (len(tensor.models) + 1)] * (len(tensor.models) + 1)


def _measured_source(measured: Measured, label: str, name: str) -> TensorReader | None:
    checkpoint = measured.get(label)
    return StoredReader(checkpoint.stored(name)) if checkpoint and name in checkpoint.tensors else None


class _Watch:
    """Refuses what is not finite, and gathers the report's numbers from a sample of every piece.

    The note is the Gram matrix (m + 1, m + 1) of the models and, last, the result, all less the base if there is one.
    """

    def __init__(self, tensor: PlannedTensor) -> None:
        self._tensor = tensor
        count = len(tensor.models) + 1
        self._gram = torch.zeros(count, count, dtype=torch.float64)

    def check_inputs(self, piece: Piece) -> None:
        """InputError naming the model with a NaN or an infinity."""
        for label, values in zip(self._tensor.labels, piece.models, strict=True):
            self._check(values, label)
        if piece.base is not None:
            self._check(piece.base, "the base model")

    def _check(self, values: Tensor, whose: str) -> None:
        if count_non_finite(values):
            raise InputError(
                f"{whose} has NaN or infinite values in {self._tensor.name}: nothing useful can be merged from it"
            )

    def look_at(self, piece: Piece, out: Tensor) -> None:
        """Take the sample; InputError where the result does not fit its type."""
        if count_non_finite(out):
            if bool(out.isnan().any()):
                raise InputError(
                    f"the merged {self._tensor.name} is not a number (0/0, or infinities that cancel): its weights add "
                    "up to nearly 0, or its inputs leave nothing to divide by; change a weight"
                )
            raise InputError(
                f"the merged {self._tensor.name} does not fit {str(out.dtype).removeprefix('torch.')}: choose another "
                "out_dtype or smaller weights"
            )
        ends = [tensor[:SAMPLE] for tensor in (*piece.models, out)]
        add_gram(ends, None if piece.base is None else piece.base[:SAMPLE], self._gram)

    def note(self) -> list[list[float]]:
        """As JSON; symmetric."""
        return (self._gram.tril() + self._gram.tril(-1).T).tolist()
