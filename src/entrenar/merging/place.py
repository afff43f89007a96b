"""Where a merge lies until it is complete: hidden directories beside the output, under names that the next run finds.

`.OUT.merging` holds files that are being written, `.OUT.merged` a merge that is still to be exported, `.OUT.statistics`
what a method measured. As anybody may foresee these names, a link or a file of others in such a place is never used:
nothing is written or removed through it.
"""

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from entrenar.core.atomic import disk_errors, fsync, remove_tree
from entrenar.core.errors import EntrenarError, InputError

_WHEN_FULL = (
    "free some space and run the same command again; it goes on where it stopped, and nothing lies under the output's "
    "name until it is complete"
)


def working_directory(output: Path) -> Path:
    """Where an unfinished merge lies."""
    return output.with_name(f".{output.name}.merging")


def export_directory(output: Path) -> Path:
    """Where a merge lies that is to be exported."""
    return output.with_name(f".{output.name}.merged")


def statistics_directory(output: Path) -> Path:
    """Where a method's statistics lie."""
    return output.with_name(f".{output.name}.statistics")


def own_directory(path: Path) -> Path:
    """Make `path` a directory, or make sure that it is one of our own; returns it.

    Raises:
        InputError: something else stands there: a link (what it points to is not touched), a file, another user's.
    """
    try:
        path.mkdir()
        return path
    except FileExistsError:
        status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        what = f"a link to {path.readlink()}" if stat.S_ISLNK(status.st_mode) else "not a directory"
        raise InputError(
            f"{path}, where this merge works, is {what}: nothing was touched; remove it, or choose another output"
        )
    if status.st_uid != os.geteuid():
        raise InputError(
            f"{path}, where this merge works, belongs to another user: remove it, or choose another output"
        )
    return path


def is_own_file(path: Path) -> bool:
    """Whether it is a regular file under this one name: no link of any kind."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def clear(directory: Path, keep: Collection[str] = (), *, directories: bool = False) -> None:
    """Remove what lies in a directory, but what has one of these names; links are unlinked.

    Kept are regular files of this one name only, or with `directories` directories only.
    """
    for path in directory.iterdir():
        is_kept = path.is_dir() and not path.is_symlink() if directories else is_own_file(path)
        if path.name not in keep or not is_kept:
            remove_tree(path)


def discard(path: Path) -> None:
    """Remove a hidden directory of a merge, whatever state it is in; of a link the link alone is left where it is."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)


@contextmanager
def disk_full(output: Path) -> Iterator[None]:
    """What writing may meet in one sentence: as core.atomic's `disk_errors`, but a merge goes on where it stopped."""
    try:
        with disk_errors(output, when_full=_WHEN_FULL):
            yield
    except OSError as error:  # such as a disk that fails
        raise EntrenarError(f"cannot write {output}: {error.strerror}") from error


def commit(directory: Path, output: Path) -> None:
    """Flush a directory's files and give it the output's name: the one step that makes a merge complete."""
    for path in directory.rglob("*"):
        fsync(path)
    fsync(directory)
    directory.rename(output)
    fsync(output.parent)
