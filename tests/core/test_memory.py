"""Anonymous memory: what the process holds itself, not the files it maps."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

from entrenar.core.memory import PeakMemory, anonymous_bytes

SIZE = 48 * 2**20
SLACK = 8 * 2**20


def take() -> mmap.mmap:
    """Memory from the kernel itself: malloc may have been told to keep what is freed (docs/kernels.md)."""
    held = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held[:: mmap.PAGESIZE] = bytes(SIZE // mmap.PAGESIZE)
    return held


def test_memory_that_is_taken_shows_and_goes_again() -> None:
    before = anonymous_bytes()
    held = take()
    taken = anonymous_bytes()
    assert abs(taken - before - SIZE) < SLACK
    held.close()
    assert abs(anonymous_bytes() - before) < SLACK


def test_a_mapped_file_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    before = anonymous_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0  # every page is in memory now
        assert anonymous_bytes() - before < SLACK


def test_a_process_that_is_not_there_has_none() -> None:
    assert anonymous_bytes(process=2**22 + 1) == 0


def test_another_process_is_read_by_its_number() -> None:
    assert abs(anonymous_bytes(os.getpid()) - anonymous_bytes()) < SLACK
    with subprocess.Popen([sys.executable, "-c", "held = b'1' * 300_000_000; input()"], stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 30
        while anonymous_bytes(child.pid) < 300_000_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert anonymous_bytes(child.pid) >= 300_000_000
        child.communicate(b"\n")


def test_the_peak_outlives_memory_that_is_freed_inside() -> None:
    before = anonymous_bytes()
    with PeakMemory(interval=0.001) as watch:
        held = take()
        deadline = time.monotonic() + 30
        while watch.peak < before + SIZE - SLACK and time.monotonic() < deadline:
            held[0] = 1
        held.close()
        assert anonymous_bytes() < before + SLACK
    assert before + SIZE - SLACK < watch.peak < before + SIZE + SLACK


def test_even_an_empty_block_is_sampled() -> None:
    with PeakMemory(interval=1000) as watch:
        pass
    assert abs(watch.peak - anonymous_bytes()) < SLACK
