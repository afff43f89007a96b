"""Write files and directories so that nothing half-written is ever visible under its final name.

A sibling temporary name is filled, flushed to disk (fsync) and renamed. On any error the temporary name is removed; one
that a killed process left is removed by the next that writes the same output. Nothing is written through a link that
stands where a temporary name goes: the name cannot be guessed and must be new.
"""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from entrenar.core.errors import EntrenarError, InputError


def refuse_existing(path: Path) -> None:
    """Raise InputError when `path` is already taken: outputs are never written over."""
    if os.path.lexists(path):
        raise InputError(f"{path} already exists and is not overwritten: choose another output name or remove it first")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, an empty file; on success it replaces `path`, on error it is removed."""
    with disk_errors(path), _temporary(path, directory=False) as temporary:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it is renamed to `path`, which must not exist."""
    refuse_existing(path)
    with disk_errors(path), _temporary(path, directory=True) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            fsync(file)
        fsync(temporary)
        temporary.rename(path)
        fsync(path.parent)


@contextmanager
def output_lock(path: Path) -> Iterator[None]:
    """Hold an output against every other process that would write it, from its first look at it to its last rename.

    The lock is `.NAME.lock` beside the output, held with flock, so it goes with the process that holds it, however that
    ends. Directories made for it are removed again if nothing was put into them.

    Raises:
        InputError: another process holds it, or nothing can be written there (said before any work is done).
    """
    new_directories = (
        [parent for parent in (path.parent, *path.parent.parents) if not parent.exists()] if _is_name(path) else []
    )
    with disk_errors(path, _NO_PLACE):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        descriptor = _locked(lock)
    if descriptor is None:
        raise InputError(f"another process is writing {path}: wait until it ends, or choose another output")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who waits for this file sees that it is gone and makes another
        os.close(descriptor)
        for parent in new_directories:
            with suppress(OSError):
                parent.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a file, a directory or a link; never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _temporary(path: Path, *, directory: bool) -> Iterator[Path]:
    """A new empty file or directory beside `path`, held with flock while it is in use and gone afterwards."""
    with disk_errors(path, _NO_PLACE):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        # The suffix stays, so that a file is known for what it is before it has its final name.
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}{'' if directory else path.suffix}")
        if directory:
            temporary.mkdir()
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        else:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        _try_lock(descriptor)
        yield temporary
    finally:
        os.close(descriptor)
        if directory:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what killed processes left of `path`: temporary names that nobody holds any more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp-*"):
        with suppress(OSError):  # a link is not opened, so neither it nor what it points to is touched
            descriptor = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if _try_lock(descriptor):
                    remove_tree(left)
            finally:
                os.close(descriptor)


def _locked(lock: Path) -> int | None:
    """An open descriptor that holds `lock`, or None while another process does."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        if not _try_lock(descriptor):
            os.close(descriptor)
            return None
        try:
            if os.path.samestat(lock.stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its last holder removed this file between our open and our lock


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: go on without, as every other tool does there
        return True
    return True


def _is_name(path: Path) -> bool:
    """Whether the system takes the path at all; what it says against it is told where it is used."""
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return True


def fsync(path: Path) -> None:
    """Have a file, or a directory's names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What a library reports in its own words when write() fails for want of space.
_NO_SPACE_TEXT = re.compile(r"No space left on device|StorageFull|File too large|\d+ requested and \d+ written")
# Errors that another output name would cure.
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
# And those that say the same while a place is made, but could be about anything later. /proc answers ENOENT.
_NO_PLACE = (*_CANNOT_WRITE, errno.ENOENT, errno.EINVAL, errno.ELOOP, errno.EEXIST)


_WHEN_FULL = (
    "the partial file was removed and what was there before is untouched; free some space and run the command again"
)


@contextmanager
def disk_errors(path: Path, codes: tuple[int, ...] = _CANNOT_WRITE, when_full: str = _WHEN_FULL) -> Iterator[None]:
    """Tell what writing `path` may meet (a full disk, a place that takes no files: `codes`) in one sentence.

    Args:
        when_full: what is true after a full disk, and what to do.

    Raises:
        EntrenarError: no space left. InputError: nothing can be written there.
    """
    try:
        yield
    except EntrenarError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or _NO_SPACE_TEXT.search(str(error)):
            raise EntrenarError(f"no space left while writing {path}: {when_full}") from error
        if isinstance(error, OSError) and error.errno in codes:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another output name") from error
        if isinstance(error, ValueError) and "\0" in str(path):
            raise InputError(f"cannot write {str(path)!r}: a name holds no NUL; choose another output name") from None
        raise
