"""A disk that fills up and a process that dies, at every place where a program writes, one after the other.

What is counted are the calls by which Python changes the disk: files opened to be written and what is written to them,
names made, moved and removed, flushes. `at(n, how)` lets the n-th of them (from 0) end the process, half of a write
written, or answer "no space left on device". It is for a process of its own (see `forked`), for it stays.
"""

import builtins
import errno
import io
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

How = Literal["kill", "full"]
KILLED = 77
_NAMES = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "ftruncate", "truncate", "posix_fallocate",
          "fsync", "fdatasync", "symlink", "link", "chmod")  # fmt: skip
# What a full disk does not refuse.
_FREES = ("rmdir", "unlink", "remove", "ftruncate", "truncate")


class Fault:
    """Counts write-like calls and strikes at one; `root`: only what lies below it is counted."""

    def __init__(self, root: Path, strike: int, how: How) -> None:
        self.root, self.strike, self.how, self.count = str(root), strike, how, 0

    def point(self, frees: bool = False) -> bool:
        """Whether the call that asks is the one."""
        self.count += 1
        return self.count - 1 == self.strike and not (frees and self.how == "full")

    def hit(self, before: Callable[[], Any] = lambda: None) -> None:
        """Die, having done `before`, or say that the disk is full."""
        if self.how == "kill":
            before()
            os._exit(KILLED)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def mine(self, path: Any) -> bool:
        """Whether a path or descriptor lies below the root."""
        try:
            name = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path).absolute()
        except (OSError, TypeError, ValueError):
            return False
        return str(name).startswith(self.root)


class _File(io.FileIO):
    fault: Fault

    def write(self, data: Any) -> int:
        """Perhaps the last."""
        if self.fault.point():
            half = bytes(data)[: max(len(bytes(data)) // 2, 1)]
            self.fault.hit(lambda: io.FileIO.write(self, half))
        return io.FileIO.write(self, data)


def at(root: Path, strike: int, how: How) -> Fault:
    """Arm this process."""
    fault = Fault(root, strike, how)
    for name in _NAMES:
        _wrap(fault, name)
    plain_open, plain_pwrite, plain_write, plain_io = os.open, os.pwrite, os.write, io.open

    def os_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_CREAT and fault.mine(path) and fault.point():
            fault.hit()
        return plain_open(path, flags, *rest, **named)

    def written(plain: Callable[..., int]) -> Callable[..., int]:
        def write(file: int, data: Any, *rest: Any) -> int:
            if fault.mine(file) and fault.point():
                fault.hit(lambda: plain(file, bytes(data)[: len(bytes(data)) // 2], *rest))
            return plain(file, data, *rest)

        return write

    def io_open(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or not fault.mine(file):
            return plain_io(file, mode, buffering, *rest, **named)
        if fault.point():
            fault.hit()
        raw = _File(file, mode.replace("b", "").replace("t", ""))
        raw.fault = fault
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        encoding = named.get("encoding") or (rest[0] if rest else None)
        return io.TextIOWrapper(buffered, encoding=encoding or "utf-8")

    os.open, os.pwrite, os.write = os_open, written(plain_pwrite), written(plain_write)  # type: ignore[assignment]
    io.open = builtins.open = io_open  # type: ignore[assignment]
    return fault


def _wrap(fault: Fault, name: str) -> None:
    plain = getattr(os, name)

    def call(path: Any, *rest: Any, **named: Any) -> Any:
        where = named.get("dir_fd") if named.get("dir_fd") is not None else path
        if fault.mine(where) and fault.point(frees=name in _FREES):
            fault.hit()
        return plain(path, *rest, **named)

    setattr(os, name, call)


def forked(work: Callable[[], object]) -> tuple[int, str]:
    """Run it in a child; 0, or KILLED, or 1 and 2 as the command's exit code, or 3 and a traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
    code, said = 0, ""
    try:
        work()
    except BaseException as error:
        code = getattr(error, "exit_code", 3)
        said = "".join(traceback.format_exception(error)) if code == 3 else str(error)
    write = getattr(os, "plain_write", os.write)
    write(writing, said.encode()[:60_000])
    os._exit(code)


def points(work: Callable[[], object], root: Path) -> int:
    """How many calls of `work` could fail."""

    def counted() -> None:
        fault = at(root, -1, "kill")
        work()
        raise SystemExit(fault.count)

    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        fault = at(root, -1, "kill")
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os.write(writing, str(fault.count).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        count = int(pipe.read())
    os.waitpid(child, 0)
    return count


def clear(root: Path) -> None:
    """Empty a directory."""
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def contents(path: Path) -> dict[str, bytes]:
    """File → bytes, of a directory or one file; an empty lock that a killed process left weighs nothing."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".lock") if path.is_dir() else [path]
    return {str(p.relative_to(path.parent)): p.read_bytes() for p in files}


if __name__ == "__main__":
    sys.exit("a module of the tests")
