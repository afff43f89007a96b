"""Anonymous memory of this process: what it holds itself, without the pages of files it maps (Linux)."""

import threading
from pathlib import Path
from types import TracebackType


def anonymous_bytes(process: int | None = None) -> int:
    """RssAnon of a process (None: this one) in bytes; 0 where the kernel does not report it."""
    try:
        lines = Path(f"/proc/{process or 'self'}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


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
