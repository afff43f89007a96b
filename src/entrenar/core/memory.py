"""Anonymous memory of this process: what it holds itself, without the pages of files it maps (Linux)."""

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """RssAnon of this process in bytes; 0 where the kernel does not report it."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


class PeakMemory:
    """Context manager that samples `anonymous_bytes` in a thread and keeps the peak, in bytes."""

    def __init__(self, interval: float = 0.02) -> None:
        self.peak = 0
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
            self.peak = max(self.peak, anonymous_bytes())
            if self._stop.wait(self._interval):
                return
