"""Write files and directories so that nothing half-written is ever visible under its final name.

A sibling temporary name is filled, flushed to disk (fsync) and renamed. On any error the temporary name is removed.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entrenar.core.errors import EntrenarError, InputError


def refuse_existing(path: Path) -> None:
    """Raise InputError when `path` is already taken: outputs are never written over."""
    if path.exists():
        raise InputError(f"{path} already exists and is not overwritten: choose another output name or remove it first")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on error it is removed."""
    temporary = _temporary_name(path)
    with _disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            fsync(temporary)
            temporary.replace(path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it is renamed to `path`, which must not exist."""
    refuse_existing(path)
    temporary = _temporary_name(path)
    with _disk_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                fsync(file)
            fsync(temporary)
            temporary.rename(path)
            fsync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


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


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except EntrenarError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or _NO_SPACE_TEXT.search(str(error)):
            raise EntrenarError(
                f"no space left while writing {path}: the partial file was removed and what was there before is "
                "untouched; free some space and run the command again"
            ) from error
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            raise InputError(f"cannot write {path}: {error.strerror}; choose another output name") from error
        raise
