"""A tensor in a file: whole and in pieces the same numbers, and never those of another file."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.files import stored_tensor
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.files.stored_tensor import ALIGNMENT, FileVersion, StoredTensor


def _stored(path: Path, values: Tensor, skip: int = 0, group: int = 1) -> StoredTensor:
    """A file of `skip` bytes and the values."""
    path.write_bytes(bytes(skip) + values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    with path.open("rb") as file:
        version = FileVersion.of(path, file.fileno())
    size = values.numel() * values.itemsize
    return StoredTensor(
        version, skip, size, tuple(values.shape), values.dtype, lambda raw: raw.view(values.dtype), group
    )


@given(
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple) | st.tuples(st.integers(1, 20), st.just(4096)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]),
    skip=st.integers(0, 9),
    group=st.sampled_from([1, 64, 3 * 4096, 5000]),
)
@settings(max_examples=60, deadline=None)
def test_whole_and_in_pieces_it_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: torch.dtype, skip: int, group: int
) -> None:
    values = torch.randn(shape).mul(50).to(dtype)
    stored = _stored(tmp_path_factory.getbasetemp() / "values", values, skip, group)
    assert stored.read().shape == shape
    assert torch.equal(stored.read(), values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_tensor, "PIECE_ELEMENTS", 2 * ALIGNMENT)
        buffer = torch.empty(stored.piece_bytes + 3, dtype=torch.uint8)
        pieces = [stored.read_piece(start, buffer).clone() for start in stored.starts()]
    assert torch.equal(torch.cat(pieces), values.flatten())
    assert all(len(piece) % ALIGNMENT == 0 and len(piece) % group == 0 for piece in pieces[:-1])


def test_a_large_tensor_comes_in_pieces_of_some_megabytes(tmp_path: Path) -> None:
    stored = _stored(tmp_path / "values", torch.zeros(2**23, dtype=torch.bfloat16))
    assert len(stored.starts()) >= 4
    assert stored.piece_bytes <= 2**23


def _replace(path: Path) -> None:
    """By a copy of itself, as a download that renames does."""
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


_CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, 100),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "written anew": lambda path: path.write_bytes(bytes(4096)),
    "replaced": lambda path: _replace(path),
    "a directory now": lambda path: (path.unlink(), path.mkdir()),
    "gone": lambda path: path.unlink(),
}  # fmt: skip


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_another_file_than_the_one_whose_header_was_read_is_an_input_error(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    path = tmp_path / "values"
    stored = _stored(path, torch.zeros(1024))
    os.utime(path, ns=(0, 0))  # so that a write within the clock's tick shows too
    with path.open("rb") as file:
        stored = StoredTensor(FileVersion.of(path, file.fileno()), 0, 4096, (1024,), torch.float32, stored.decode)
    assert torch.equal(stored.read(), torch.zeros(1024))
    change(path)
    for read in (stored.read, lambda: stored.read_piece(0, torch.empty(4096, dtype=torch.uint8))):
        with pytest.raises(InputError, match=rf"{path} (has changed|cannot be read)"):
            read()


def test_a_file_that_ends_while_it_is_read_is_an_input_error(tmp_path: Path) -> None:
    """As one that is cut after it was opened."""
    path = tmp_path / "values"
    stored = _stored(path, torch.zeros(1024))
    beyond = StoredTensor(stored.file, 0, 4100, (1025,), torch.float32, stored.decode)
    with pytest.raises(InputError, match=rf"{path} ends inside a tensor"):
        beyond.read()


def test_what_is_read_does_not_lean_on_the_file(tmp_path: Path) -> None:
    """No mapping, no open descriptor, and later changes do not show."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5000), "b": torch.ones(7)}, path)
    checkpoint = SafetensorsCheckpoint(path)
    read = checkpoint.read("a")
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert str(path) not in {str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    path.write_bytes(b"")
    assert torch.equal(read, torch.ones(5000))
