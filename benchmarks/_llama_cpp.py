"""The peer of the GGUF quantizers: llama.cpp's own, from the library inside llama-cpp-python.

It quantizes half of the rows in each of two Python threads (ctypes lets go of the GIL), into a buffer that is there
already; ours makes a fresh tensor.
"""

import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
from torch import Tensor

THREADS = 2


def quantizer(weight: Tensor, packed: Tensor, type: str) -> Callable[[], object]:
    """Work that quantizes weight (rows, columns) float32 into packed (rows, bytes) uint8 as `type`."""
    count, columns = weight.shape
    kind, half = gguf.GGMLQuantizationType[type.upper()], count // THREADS
    quantize = _ggml_quantize_chunk()
    pool = ThreadPoolExecutor(THREADS)

    def part(index: int) -> int:
        return quantize(kind, weight.data_ptr(), packed.data_ptr(), index * half * columns, half, columns, None)

    return lambda: list(pool.map(part, range(THREADS)))


def _ggml_quantize_chunk() -> Callable[..., int]:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("llama-cpp-python is not installed: run `make bench`")
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (ctypes.c_int, pointer, pointer, number, number, number, pointer)
    return function
