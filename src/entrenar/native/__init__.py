"""Finds, loads and calls the native CPU kernels (csrc/), a shared object that knows neither Python nor torch.

Environment:
    ENTRENAR_KERNELS: `reference` (plain PyTorch), or a path of the library: `generic`, `avx2`, `avx512`, `amx`, `neon`.
        Unset: the best path this CPU has.
    ENTRENAR_LIBRARY: another build of the library, e.g. one with sanitizers.
    ENTRENAR_MALLOC: `default` leaves glibc's malloc as it is; otherwise memory that was freed is kept for reuse, and
        training asks for huge pages.
"""

import ctypes
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from entrenar.core.errors import EntrenarError, InputError

_LOG = logging.getLogger(__name__)
_NAME = "libentrenar_kernels.so"
_PATHS = ("generic", "avx2", "avx512", "amx", "neon")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/common/floats.h
_ERRORS = {
    -1: "a size is negative or overflows",
    -2: "a buffer is too small for the sizes",
    -3: "the block size is not allowed",
    -4: "a buffer is missing",
    -5: "the dtype is not float32, float16 or bfloat16",
    -6: "this CPU has no such path",
    -7: "an argument is out of range",
    -8: "there is no memory for scratch",
}
_BUFFER = (ctypes.c_void_p, ctypes.c_int64)
_TYPES = {
    "n": (ctypes.c_int64,), "i": (ctypes.c_int,), "f": (ctypes.c_float,), "p": (ctypes.c_void_p,),
    "b": _BUFFER, "s": _BUFFER,
}  # fmt: skip


class Function:
    """An exported function of the library.

    Args:
        name: its name.
        signature: a letter per argument: b a buffer (a contiguous CPU tensor or None, passed as address and bytes),
            s one with strides (address of its first element, bytes from there to the end of its storage), p a plain
            address, n an int64, i an int, f a float.
    """

    def __init__(self, name: str, signature: str) -> None:
        self.name, self.signature = name, signature

    def __call__(self, *args: Tensor | float | None) -> None:
        """Call it; InputError with what is wrong if it refuses."""
        values: list[float | None] = []
        for letter, value in zip(self.signature, args, strict=True):
            if letter == "b":
                values += buffer(value)
            elif letter == "s":
                values += _strided(value)
            else:
                assert isinstance(value, int | float)
                values.append(value)
        code = self._function(*values)
        if code:
            raise InputError(f"{self.name} refused its arguments: {_ERRORS.get(code, f'error {code}')}")

    @cached_property
    def _function(self) -> Callable[..., int]:
        library = _library()
        assert library is not None, "callers ask available() first"
        try:
            function = library[self.name]
        except AttributeError as error:
            hint = "build it again with `pip install -e .`"
            raise EntrenarError(f"{library._name} has no {self.name}, it is older than the sources: {hint}") from error
        function.argtypes = [kind for letter in self.signature for kind in _TYPES[letter]]
        return function


def buffer(tensor: Tensor | float | None) -> list[int | None]:
    """Address and bytes of a contiguous CPU tensor; a null pointer for None."""
    if tensor is None:
        return [None, 0]
    assert isinstance(tensor, Tensor)
    assert tensor.is_contiguous()
    assert tensor.is_cpu
    return [tensor.data_ptr(), tensor.nbytes]


def _strided(tensor: Tensor | float | None) -> list[int | None]:
    assert isinstance(tensor, Tensor)
    assert tensor.device.type == "cpu"
    before = int(tensor.storage_offset()) * tensor.element_size()
    return [tensor.data_ptr(), tensor.untyped_storage().nbytes() - before]


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
    return not _state.reference and _library() is not None


def asks_for_reference() -> bool:
    """Whether the user wants plain PyTorch, on every device."""
    _library()
    return _state.reference


def file() -> Path | None:
    """The native library's file, if it is built."""
    return _find()


def path() -> str:
    """The path in use: `reference`, `generic`, `avx2`, `avx512` or `neon`."""
    library = _library()
    return "reference" if _state.reference or library is None else library.entrenar_path().decode()


def use_huge_pages() -> None:
    """Ask for huge pages in what the process allocates from now on; nothing with ENTRENAR_MALLOC=default."""
    library = _library()
    if library is not None and _tunes_malloc():
        library.entrenar_use_huge_pages()


_scratch = Function("entrenar_scratch", "np")


def scratch(count: int, dtype: torch.dtype) -> Tensor:
    """(count,) of this thread's scratch, count > 0: overwritten by its next residual block."""
    found, size = ctypes.c_void_p(), count * dtype.itemsize
    _scratch(size, ctypes.addressof(found))
    assert found.value is not None
    return torch.frombuffer((ctypes.c_char * size).from_address(found.value), dtype=dtype)


def supported_paths() -> list[str]:
    """Every path this machine can run."""
    library = _library()
    if library is None:
        return ["reference"]
    current = library.entrenar_path()
    found = [name for name in _PATHS if library.entrenar_set_path(name.encode()) == 0]
    library.entrenar_set_path(current)
    return ["reference", *found]


def set_path(name: str) -> None:
    """Use `name` from now on; InputError where this machine or this install cannot."""
    if name not in ("reference", *_PATHS):
        raise InputError(f"unknown kernel path {name!r}: the paths are reference, {', '.join(_PATHS)}")
    _state.reference = name == "reference"
    library = _library()
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
def _library() -> ctypes.CDLL | None:
    """The loaded library, prepared once; None if there is none."""
    chosen = os.environ.get("ENTRENAR_KERNELS", "")
    if chosen not in ("", "reference", *_PATHS):
        raise InputError(
            f"ENTRENAR_KERNELS is {chosen!r}: allowed are reference, {', '.join(_PATHS)}, or leave it unset"
        )
    _state.reference = _state.reference or chosen == "reference"
    found = _find()
    if chosen == "reference":
        _LOG.info("ENTRENAR_KERNELS=reference: plain PyTorch serves in place of the native kernels")
    elif found is None:
        _LOG.warning("the native kernels are not built (no C++ compiler at install time?): slower PyTorch ones serve")
    if found is None and chosen not in ("", "reference"):
        raise InputError(f"ENTRENAR_KERNELS is {chosen!r} but the native kernels are not built: unset it")
    if found is None:
        return None
    library = ctypes.CDLL(str(found))
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


def _tunes_malloc() -> bool:
    return os.environ.get("ENTRENAR_MALLOC", "") != "default"


def _find() -> Path | None:
    """Beside this file (a wheel), or in site-packages (an editable install, whose sources are elsewhere)."""
    override = os.environ.get("ENTRENAR_LIBRARY")
    if override:
        if not Path(override).is_file():
            raise InputError(f"ENTRENAR_LIBRARY is {override!r}, which is not a file: give a built {_NAME}")
        return Path(override)
    places = [Path(__file__).parent, Path(sysconfig.get_path("platlib")) / "entrenar" / "native"]
    return next((place / _NAME for place in places if (place / _NAME).is_file()), None)


def _gomp_parallel() -> int | None:
    """Address of the GOMP_parallel that torch itself calls, so that both share one pool of threads; None if unknown."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(torch_library)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
