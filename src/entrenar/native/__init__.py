"""The boundary to the native CPU kernels (csrc/), a shared object that knows neither Python nor torch.

abi.py says what crosses it, library.py finds and loads the shared object, checkout.py builds it again where its sources
have changed, calls.py calls it.

Environment:
    ENTRENAR_KERNELS: `reference` (plain PyTorch), or a path of the library: `generic`, `avx2`, `avx512`, `amx`, `neon`.
        Unset: the best path this CPU has.
    ENTRENAR_LIBRARY: another build of the library, e.g. one with sanitizers.
    ENTRENAR_MALLOC: `default` leaves glibc's malloc as it is; otherwise memory that was freed is kept for reuse, and
        training asks for huge pages.
"""

from entrenar.native.calls import Function, buffer, scratch
from entrenar.native.library import (
    DTYPES,
    asks_for_reference,
    available,
    file,
    is_eager,
    is_plain,
    path,
    set_path,
    supported_paths,
    threads,
    use_huge_pages,
    using,
)

__all__ = [
    "DTYPES",
    "Function",
    "asks_for_reference",
    "available",
    "buffer",
    "file",
    "is_eager",
    "is_plain",
    "path",
    "scratch",
    "set_path",
    "supported_paths",
    "threads",
    "use_huge_pages",
    "using",
]
