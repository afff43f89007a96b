"""Anonymous memory of this process: what it holds itself, without the pages of files it maps; and what it may take
(Linux)."""

import threading
from pathlib import Path
from types import TracebackType


def anonymous_bytes(process: int | None = None) -> int:
    """RssAnon of a process (None: this one) in bytes; 0 where the kernel does not report it."""
    lines = _text(f"/proc/{process or 'self'}/status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def available_bytes() -> int | None:
    """What this process can take before the machine or its control group is full; None where neither says."""
    limits = (_machine_available(), _group_available())
    return min((count for count in limits if count is not None), default=None)


def _machine_available() -> int | None:
    text = _text("/proc/meminfo")
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:")), None)


def _group_available() -> int | None:
    """Of the control group this process is seen in, version 2 or 1; pages of files count as free."""
    for root, limit, usage, cached in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _text(f"{root}/{limit}").strip(), _text(f"{root}/{usage}").strip()
        if most.isdigit() and used.isdigit():  # `max`: no limit
            rows = (line.split() for line in _text(f"{root}/memory.stat").splitlines())
            files = next((int(row[1]) for row in rows if row[0] == cached), 0)
            return max(int(most) - int(used) + files, 0)
    return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


class PeakMemory:
    """Context manager that samples `anonymous_bytes` of a process in a thread and keeps the peak, in bytes."""

    def __init__(self, interval: float = 0.02, process: int | None = None) -> None:
        self.peak = 0
        self._process = process
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes(self._process))
            if self._stop.wait(self._interval):
                return
