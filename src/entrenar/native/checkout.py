"""A checkout's own build of the kernels: made again by itself when a file of csrc/ is newer than it.

scikit-build-core's `editable.rebuild` would start cmake in every process that imports entrenar; a look at the files'
times costs under a millisecond (decision 0021).
"""

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

_LOG = logging.getLogger(__name__)
ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "native"


def sources() -> list[Path]:
    """What the kernels are built from; nothing where this is no checkout."""
    if not (ROOT / "CMakeLists.txt").is_file():
        return []
    return [ROOT / "CMakeLists.txt", *(ROOT / "csrc").glob("*/*")]


def current_library(installed: Path | None, name: str) -> Path | None:
    """The library that was built from the sources as they are: the installed one, a checkout's own, or one that is
    built now. Where it cannot be built the newest there is, with a warning."""
    changed = max((path.stat().st_mtime_ns for path in sources()), default=0)
    candidates = [path for path in (BUILD / name, installed) if path is not None and path.is_file()]
    newest = max(candidates, key=_time, default=None)
    if newest is None or not changed or _time(newest) >= changed:
        return newest
    return _built(name, changed) or newest


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _built(name: str, changed: int) -> Path | None:
    """Build, one process at a time; None, with a warning, where that fails."""
    cmake = shutil.which("cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if cmake is None:
        _LOG.warning("csrc/ is newer than the kernels and there is no cmake: `pip install -e .` builds them again")
        return None
    BUILD.mkdir(parents=True, exist_ok=True)
    library, log = BUILD / name, BUILD / "build.log"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file() and _time(library) >= changed:
            return library  # another process was faster
        _LOG.warning("csrc/ has changed: building the kernels")
        commands = (
            [cmake, "-S", str(ROOT), "-B", str(BUILD)],
            [cmake, "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)],
        )
        with log.open("wb") as output:
            failed = any(subprocess.run(each, stdout=output, stderr=subprocess.STDOUT).returncode for each in commands)
        if failed or not library.is_file():
            _LOG.warning("csrc/ is newer than the kernels and building them failed (%s): the older ones serve", log)
            return None
        os.utime(library)  # where nothing had to be compiled it is current all the same
        return library
