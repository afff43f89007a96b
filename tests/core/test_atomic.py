"""Nothing half-written is ever visible under its final name."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from entrenar.core.atomic import atomic_directory, atomic_file, output_lock, refuse_existing, remove_tree, write_text
from entrenar.core.errors import EntrenarError, InputError


def tree(directory: Path) -> dict[str, bytes]:
    """Everything below a directory; a temporary name would show."""
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else b"" for p in directory.rglob("*")}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses every write beyond `size` bytes with EFBIG: a full disk, for real, without a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def writing(target: Path, *, directory: bool) -> AbstractContextManager[Path]:
    return atomic_directory(target) if directory else atomic_file(target)


def put(temporary: Path, data: bytes, *, directory: bool) -> None:
    (temporary / "part" if directory else temporary).write_bytes(data)


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "out.bin"
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert tree(target.parent) == {"out.bin": b"new"}


def test_a_file_replaces_the_one_before(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert tree(tmp_path) == {"out.bin": b"new"}


def test_a_directory_appears_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "one"
    with atomic_directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_bytes(b"new")
        assert not target.exists()
    assert tree(target.parent) == {"one": b"", "one/sub": b"", "one/sub/file": b"new"}


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt(), InputError("bad"), OSError(5, "I/O")])
def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(failure)) as caught, atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        raise failure
    assert caught.value is failure
    assert tree(tmp_path) == {"out.bin": b"old"}


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failure_leaves_no_directory(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), atomic_directory(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_bytes(b"half")
        raise failure
    assert tree(tmp_path) == {}


def test_an_existing_directory_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_bytes(b"old")
    with pytest.raises(InputError, match="already exists"), atomic_directory(target):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"out": b"", "out/mine": b"old"}


def test_refuse_existing_names_what_is_in_the_way(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "free")
    with pytest.raises(InputError, match=str(tmp_path)):
        refuse_existing(tmp_path)


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_reported_full_disk_is_a_sentence_and_exit_code_1(tmp_path: Path, code: int, directory: bool) -> None:
    target = tmp_path / "out"
    with pytest.raises(EntrenarError, match="no space left") as caught, writing(target, directory=directory) as part:
        put(part, b"half", directory=directory)
        raise OSError(code, "as the system says it")
    assert caught.value.exit_code == 1
    assert str(target) in str(caught.value)
    assert tree(tmp_path) == {}


def test_a_full_disk_reported_in_a_librarys_own_words_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(EntrenarError, match="no space left") as caught, atomic_file(tmp_path / "out") as part:
        part.write_bytes(b"half")
        raise RuntimeError('I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }')
    assert caught.value.exit_code == 1
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("directory", [False, True])
def test_a_disk_that_is_really_full_leaves_what_was_there(tmp_path: Path, directory: bool) -> None:
    (tmp_path / "before").write_bytes(b"old")
    target = tmp_path / "out"
    with (
        pytest.raises(EntrenarError, match="no space left") as caught,
        file_size_limit(4096),
        writing(target, directory=directory) as part,
    ):
        put(part, bytes(64 * 1024), directory=directory)
    assert caught.value.exit_code == 1
    assert tree(tmp_path) == {"before": b"old"}


def test_a_disk_that_is_really_full_keeps_the_file_it_was_to_replace(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(EntrenarError, match="no space left"), file_size_limit(4096):
        write_text(target, "x" * 64 * 1024)
    assert tree(tmp_path) == {"out": b"old"}


def test_a_name_that_cannot_be_written_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    for name in ("file/below", "directory", "x" * 250):
        with pytest.raises(InputError, match="cannot write") as caught:
            write_text(tmp_path / name, "text")
        assert str(tmp_path / name) in str(caught.value)
    assert tree(tmp_path) == {"file": b"", "directory": b""}


def test_a_directory_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot write"), atomic_directory(tmp_path / "file" / "below"):
        pytest.fail("the block must not run")


def test_the_data_is_flushed_to_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[tuple[int, list[str]]] = []

    def fsync(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, [name for name in ("file", "dir") if (tmp_path / name).exists()]))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "file", "text")
    with atomic_directory(tmp_path / "dir") as temporary:
        (temporary / "inner").write_bytes(b"data")
    for path, before in (("file", []), ("dir/inner", ["file"]), ("dir", ["file"])):
        assert ((tmp_path / path).stat().st_ino, before) in flushed
    assert flushed[-1] == (tmp_path.stat().st_ino, ["file", "dir"])  # the new name itself, last


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "out", "±é漢\n")
    assert (tmp_path / "out").read_bytes() == "±é漢\n".encode()


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path: Path) -> None:
    """In a container the process id is the same at every start, so the leftover may have any name of ours."""
    (tmp_path / f".out.tmp-{os.getpid()}").mkdir()
    (tmp_path / f".out.tmp-{os.getpid()}" / "half").write_bytes(b"x")
    (tmp_path / ".note.tmp-1").write_bytes(b"half")
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "part").write_bytes(b"new")
    write_text(tmp_path / "note", "new")
    assert tree(tmp_path) == {"out": b"", "out/part": b"new", "note": b"new"}


def test_a_temporary_name_in_use_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with atomic_file(target) as first, atomic_file(target) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert tree(tmp_path) == {"out.bin": b"first"}


def test_nothing_is_written_or_removed_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").write_bytes(b"mine")
    (tmp_path / ".out.tmp-1").symlink_to(elsewhere)
    with atomic_directory(tmp_path / "out"):
        pass
    (tmp_path / ".gone").symlink_to(elsewhere)
    remove_tree(tmp_path / ".gone")
    assert (elsewhere / "keep").read_bytes() == b"mine"
    assert not (tmp_path / ".gone").is_symlink()


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("place", ["/proc/x", "/proc/self/x/y", "/dev/null/x", "n" * 300, "a\0b"])
def test_an_impossible_place_is_a_sentence(tmp_path: Path, place: str, directory: bool) -> None:
    with pytest.raises(InputError, match="cannot write"), writing(tmp_path / place, directory=directory):
        raise AssertionError
    with pytest.raises(InputError, match="cannot write"), output_lock(tmp_path / place):
        raise AssertionError


def test_an_output_is_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "one"
    with output_lock(target):
        with pytest.raises(InputError, match="another process is writing"), output_lock(target):
            raise AssertionError
        target.mkdir()
    assert tree(tmp_path) == {"runs": b"", "runs/one": b""}
    with output_lock(target):
        pass


def test_a_lock_leaves_no_directory_behind(tmp_path: Path) -> None:
    with output_lock(tmp_path / "deep" / "down" / "one"):
        assert (tmp_path / "deep" / "down").is_dir()
    assert tree(tmp_path) == {}


def test_a_lock_goes_with_the_process_that_held_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from entrenar.core.atomic import output_lock\n"
        "with output_lock(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "one"], check=False).returncode == 9
    assert (tmp_path / ".one.lock").exists()
    with output_lock(tmp_path / "one"):
        pass
    assert tree(tmp_path) == {}
