"""Finds and loads the library, and says which of its paths serves."""

import ctypes
import logging
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from entrenar.core.errors import InputError
from entrenar.native import abi
from entrenar.native.checkout import current_library

_LOG = logging.getLogger(__name__)
_NAME = "libentrenar_kernels.so"
_PATHS = ("generic", "avx2", "avx512", "amx", "neon")
DTYPES = dict(
    zip((torch.float32, torch.float16, torch.bfloat16), abi.constants("kFloat32", "kFloat16", "kBfloat16"), strict=True)
)


def threads() -> int:
    """How many threads a kernel may use: as many as torch itself."""
    return torch.get_num_threads()


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary tensor and nobody traces or intercepts what is done with it."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
    )


def is_eager(x: Tensor) -> bool:
    """Whether a call with x may go straight to the library."""
    return x.device.type == "cpu" and is_plain(x)


def available() -> bool:
    """Whether the native library serves, rather than the PyTorch reference."""
    return not _state.reference and loaded() is not None


def asks_for_reference() -> bool:
    """Whether the user wants plain PyTorch, on every device."""
    loaded()
    return _state.reference


def file() -> Path | None:
    """The native library's file, if it is built."""
    return _find()


def path() -> str:
    """The path in use: `reference`, `generic`, `avx2`, `avx512`, `amx` or `neon`."""
    library = loaded()
    return "reference" if _state.reference or library is None else library.entrenar_path().decode()


def use_huge_pages() -> None:
    """Ask for huge pages in what the process allocates from now on; nothing with ENTRENAR_MALLOC=default."""
    library = loaded()
    if library is not None and _tunes_malloc():
        library.entrenar_use_huge_pages()


def supported_paths() -> list[str]:
    """Every path this machine can run."""
    library = loaded()
    if library is None:
        return ["reference"]
    current = library.entrenar_path()
    supported = [name for name in _PATHS if library.entrenar_set_path(name.encode()) == 0]
    library.entrenar_set_path(current)
    return ["reference", *supported]


def set_path(name: str) -> None:
    """Use `name` from now on; InputError where this machine or this install cannot."""
    if name not in ("reference", *_PATHS):
        raise InputError(f"unknown kernel path {name!r}: the paths are reference, {', '.join(_PATHS)}")
    _state.reference = name == "reference"
    library = loaded()
    if name == "reference":
        return
    if library is None:
        raise InputError(f"kernel path {name!r} needs the native library, which this install lacks: choose reference")
    if library.entrenar_set_path(name.encode()):
        raise InputError(f"this CPU cannot run the {name} kernels: it has {', '.join(supported_paths())}")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use a path for the length of a `with` block; for tests and benchmarks."""
    before = path()
    set_path(name)
    try:
        yield
    finally:
        set_path(before)


class _State:
    def __init__(self) -> None:
        self.reference = False


_state = _State()


@cache
def loaded() -> ctypes.CDLL | None:
    """The loaded library, prepared once; None if there is none."""
    chosen = os.environ.get("ENTRENAR_KERNELS", "")
    if chosen not in ("", "reference", *_PATHS):
        raise InputError(
            f"ENTRENAR_KERNELS is {chosen!r}: allowed are reference, {', '.join(_PATHS)}, or leave it unset"
        )
    _state.reference = _state.reference or chosen == "reference"
    built = _find()
    if chosen == "reference":
        _LOG.info("ENTRENAR_KERNELS=reference: plain PyTorch serves in place of the native kernels")
    elif built is None:
        _LOG.warning("the native kernels are not built (no C++ compiler at install time?): slower PyTorch ones serve")
    if built is None and chosen not in ("", "reference"):
        raise InputError(f"ENTRENAR_KERNELS is {chosen!r} but the native kernels are not built: unset it")
    library = None if built is None else _checked(built)
    if library is None and chosen not in ("", "reference"):
        raise InputError(f"ENTRENAR_KERNELS is {chosen!r} but {built} was built from other sources: build it again")
    if library is None:
        return None
    library.entrenar_path.restype = ctypes.c_char_p
    library.entrenar_set_path.argtypes = [ctypes.c_char_p]
    library.entrenar_use_gomp.argtypes = [ctypes.c_void_p]
    library.entrenar_use_gomp.restype = None
    library.entrenar_use_gomp(_gomp_parallel())
    if _tunes_malloc():
        library.entrenar_keep_freed_memory()
    if chosen not in ("", "reference") and library.entrenar_set_path(chosen.encode()):
        raise InputError(f"ENTRENAR_KERNELS is {chosen!r}, which this CPU cannot run: unset it")
    return library


def _checked(file: Path) -> ctypes.CDLL | None:
    """The library, if its layout is the one that `abi` describes; else None, and a sentence."""
    library = ctypes.CDLL(str(file))
    difference = layout_difference(library)
    if difference is None:
        return library
    _LOG.warning(
        "%s was built from other sources than this Python code (%s), so slower PyTorch kernels serve: build it again "
        "with `pip install -e .`",
        file, difference,
    )  # fmt: skip
    return None


def layout_difference(library: ctypes.CDLL) -> str | None:
    """The first line of a library's layout that is not `abi`'s; None if all are alike."""
    if not hasattr(library, "entrenar_abi"):
        return "it does not tell its layout"
    library.entrenar_abi.restype = ctypes.c_char_p
    theirs, ours = library.entrenar_abi().decode().splitlines(), abi.text().splitlines()
    if theirs == ours:
        return None
    pairs = zip_longest(theirs, ours, fillvalue="nothing")
    there, here = next(pair for pair in pairs if pair[0] != pair[1])
    return f"it has `{there}` where this has `{here}`"


def _tunes_malloc() -> bool:
    return os.environ.get("ENTRENAR_MALLOC", "") != "default"


def _find() -> Path | None:
    """Beside this file (a wheel), in site-packages or in a checkout's build (an editable install)."""
    override = os.environ.get("ENTRENAR_LIBRARY")
    if override:
        if not Path(override).is_file():
            raise InputError(f"ENTRENAR_LIBRARY is {override!r}, which is not a file: give a built {_NAME}")
        return Path(override)
    places = (Path(__file__).parent, Path(sysconfig.get_path("platlib")) / "entrenar" / "native")
    installed = next((place / _NAME for place in places if (place / _NAME).is_file()), None)
    return current_library(installed, _NAME)


def _gomp_parallel() -> int | None:
    """Address of the GOMP_parallel that torch itself calls, so that both share one pool of threads; None if unknown."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(torch_library)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
