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

from entrenar.core.errors import EntrenarError

_LOG = logging.getLogger(__name__)
ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "native"


def sources() -> list[Path]:
    """What the kernels are built from; nothing where this is no checkout."""
    csrc = ROOT / "csrc"
    if not (csrc / "abi" / "abi.h").is_file():  # site-packages, or a copy of this package in another project
        return []
    return [ROOT / "CMakeLists.txt", *csrc.glob("*/*.cpp"), *csrc.glob("*/*.h")]


def current_library(installed: Path | None, name: str) -> Path | None:
    """The library that was built from the sources as they are: the installed one, a checkout's own, or one that is
    built now. Where it cannot be built the newest there is, with a warning."""
    changed = max(map(_time, sources()), default=0)
    current = BUILD / "current" / name
    candidates = [path for path in (current, installed) if path is not None and path.is_file()]
    newest = max(candidates, key=_time, default=None)
    if newest is None or _time(newest) >= changed:
        return newest
    try:
        _make_current(current, changed)
    except (OSError, EntrenarError) as error:
        _LOG.warning("csrc/ is newer than the kernels, and building them failed (%s): the older ones serve", error)
        return newest
    return current


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns


def _make_current(current: Path, changed: int) -> None:
    """Build, one process at a time, and publish what was built in one step: another process may be about to load it."""
    current.parent.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if current.is_file() and _time(current) >= changed:
            return  # another process was faster
        _LOG.warning("csrc/ has changed: building the kernels")
        _build()
        new = current.with_suffix(".new")
        shutil.copyfile(BUILD / current.name, new)
        # As old as the sources it was built from: what is edited during the build is newer, a file from the future not.
        os.utime(new, ns=(changed, changed))
        new.replace(current)


def _build() -> None:
    cmake = shutil.which("cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if cmake is None:
        raise EntrenarError("there is no cmake; `pip install -e .` brings one and builds them")
    log = BUILD / "build.log"
    commands = (
        [cmake, "-S", str(ROOT), "-B", str(BUILD)],
        [cmake, "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)],
    )
    with log.open("wb") as output:
        if any(subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode for command in commands):
            raise EntrenarError(f"{log} says why")
