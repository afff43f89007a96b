"""Speed of the GGUF quantizers against llama.cpp's (the library inside llama-cpp-python), on the same weight, in turns.

    python benchmarks/kernels_gguf.py [--json]

Both use two threads: llama.cpp quantizes half of the rows in each of two Python threads (ctypes lets go of the GIL),
into a buffer that is there already; ours makes a fresh tensor.
"""

import ctypes
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from entrenar.ops.gguf_blocks import quantize_gguf

THREADS = 2
SHAPES = ((8192, 2048), (2048, 2048))
LIMITS = {"q4_k": 1.0, "q6_k": 1.0, "q8_0": 1.5, "q4_0": 1.5}


def rows(seconds: float = 2.0) -> Iterator[dict[str, Any]]:
    """One result for each metric and shape, from about that many seconds of turns; medians, in Gelem/s."""
    torch.set_num_threads(THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        for shape in SHAPES:
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            for type, limit in LIMITS.items():
                ours, peer = _in_turns(
                    lambda type=type, weight=weight: quantize_gguf(weight, type),
                    _llama_cpp(pool, weight, type),
                    seconds,
                )
                speeds = [weight.numel() / each / 1e9 for each in (ours, peer)]
                yield {
                    "metric": f"quantize_gguf_{type}",
                    "shape": "×".join(map(str, shape)),
                    "unit": "Gelem/s",
                    "ours": speeds[0],
                    "peer": speeds[1],
                    "peer_name": "llama.cpp",
                    "ratio": speeds[0] / speeds[1],
                    "limit": limit,
                }


def _in_turns(ours: Callable[[], object], peer: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median seconds of each, of five turns or more; one turn to warm up."""
    taken: tuple[list[float], list[float]] = ([], [])
    while len(taken[0]) < 6 or sum(taken[0]) + sum(taken[1]) < seconds:
        for work, times in zip((ours, peer), taken, strict=True):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return statistics.median(taken[0][1:]), statistics.median(taken[1][1:])


def _llama_cpp(pool: ThreadPoolExecutor, weight: Tensor, type: str) -> Callable[[], object]:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit("llama-cpp-python is not installed: run `make bench`")
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    quantize.argtypes = (ctypes.c_int, pointer, pointer, number, number, number, pointer)
    count, columns = weight.shape
    packed = torch.empty_like(quantize_gguf(weight, type))
    kind, half = gguf.GGMLQuantizationType[type.upper()], count // THREADS

    def part(index: int) -> int:
        start = index * half * columns
        return quantize(kind, weight.data_ptr(), packed.data_ptr(), start, half, columns, None)

    return lambda: list(pool.map(part, range(THREADS)))


def main() -> int:
    """Print a line per result; 1 if one is below its limit."""
    results = list(rows())
    for result in results:
        if "--json" in sys.argv:
            print(json.dumps(result))
        else:
            print(
                f"{result['metric']:20} {result['shape']:>10}  ours {result['ours']:7.3f}  llama.cpp "
                f"{result['peer']:7.3f} {result['unit']}  ratio {result['ratio']:5.2f} (at least {result['limit']})"
            )
    return int(any(result["ratio"] < result["limit"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
