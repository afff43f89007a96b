"""The native CPU kernels against bitsandbytes, torch, memcpy, llama.cpp: 2 threads, medians, taking turns in one run.

python benchmarks/kernels.py [--json FILE] [--rounds N] [--only PART_OF_A_NAME]
"""

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from _elementwise import elementwise_rows
from _llama_cpp import quantizer as llama_cpp_quantizer
from _timing import (
    PeerProcess,
    Row,
    Work,
    alternate,
    arguments,
    duration,
    leave_this_folder,
    rate,
    report,
    seconds,
    timed,
)

import entrenar
from entrenar import native
from entrenar.layers.quantized_linear import quantized_linear
from entrenar.opening.compute import native_dtype
from entrenar.ops.codebook.dequantize import dequantize_codebook_into
from entrenar.ops.gguf.blocks import quantize_gguf
from entrenar.quant.codebooks import codebook
from entrenar.quant.scales import scale_tensors

THREADS = 2
SHAPES = ((8192, 2048), (2048, 2048))
Shape = tuple[int, int]


def bitsandbytes_work(name: str, shape: Shape, dtype: torch.dtype, nested: bool) -> Work:
    """What the peer's process runs."""
    leave_this_folder()
    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.set_num_threads(THREADS)
    weight = torch.randn(shape).to(dtype)
    if name == "quantize":
        return lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    if name == "dequantize":
        return lambda: dequantize_4bit(packed, state)
    x = torch.randn(1, shape[1], dtype=dtype, requires_grad=True)
    return lambda: matmul_4bit(x, packed.t(), quant_state=state)


def quantize_rows(shape: Shape, peer: PeerProcess, rounds: int) -> Iterator[tuple[str, Callable[[str], Row]]]:
    """Weights of each dtype to nf4."""
    for dtype, short in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):

        def measure(metric: str, dtype: torch.dtype = dtype) -> Row:
            weight = torch.randn(shape).to(dtype)
            other = peer.prepare("quantize", shape, dtype, False)
            times = alternate(lambda: entrenar.quantize_4bit(weight, format="nf4"), other, min(rounds, 7))
            return rate(metric, size(shape), weight.numel(), times, "bitsandbytes", 50)

        yield f"quantize_nf4_{short}", measure


def dequantize_rows(shape: Shape, peer: PeerProcess, rounds: int) -> Iterator[tuple[str, Callable[[str], Row]]]:
    """And back, into a fresh tensor and into the caller's."""
    for nested, suffix in ((False, ""), (True, "_double_quant")):

        def measure(metric: str, nested: bool = nested) -> Row:
            held = entrenar.quantize_4bit(torch.randn(shape), format="nf4", double_quant=nested)
            other = peer.prepare("dequantize", shape, torch.bfloat16, nested)
            times = alternate(lambda: held.dequantize(torch.bfloat16), other, rounds)
            return rate(metric, size(shape), held.numel, times, "bitsandbytes", 4)

        yield f"dequantize_nf4_bf16{suffix}", measure
    yield "dequantize_nf4_bf16_into", partial(into_row, shape, rounds)


def into_row(shape: Shape, rounds: int, metric: str) -> Row:
    """Bytes read and written against the machine's copy."""
    held = entrenar.quantize_4bit(torch.randn(shape), format="nf4")
    out, table, scales = (
        torch.empty(shape, dtype=torch.bfloat16),
        codebook("nf4", held.device),
        scale_tensors(held.parts),
    )
    moved = held.memory_bytes + out.numel() * 2
    ours, copy = alternate(
        lambda: dequantize_codebook_into(held.parts["codes"], scales, table, 64, out), copying(), rounds
    )
    return Row(
        metric=metric, shape=size(shape), unit="GB/s", ours=moved / ours / 1e9, peer=2 * COPIED / copy / 1e9,
        peer_name="memcpy", ratio=(moved / ours) / (2 * COPIED / copy), limit=0.6,
    )  # fmt: skip


COPIED = 1 << 28


def copying() -> Callable[[], float]:
    """The machine's copy: 256 MiB, libc's memcpy on one thread or on two, whichever is faster this time."""
    source, target = torch.zeros(COPIED, dtype=torch.uint8), torch.ones(COPIED, dtype=torch.uint8)
    pool = ThreadPoolExecutor(THREADS)

    def copy(parts: int) -> None:
        each = COPIED // parts
        jobs = [(target.data_ptr() + i * each, source.data_ptr() + i * each, each) for i in range(parts)]
        list(pool.map(lambda job: ctypes.memmove(*job), jobs))

    return lambda: min(seconds(partial(copy, parts)) for parts in range(1, THREADS + 1))


def linear_rows(shape: Shape, peer: PeerProcess, rounds: int) -> Iterator[tuple[str, Callable[[str], Row]]]:
    """The layer as training runs it."""

    def one_token(metric: str) -> Row:
        held = entrenar.quantize_4bit(torch.randn(shape), format="nf4")
        x = torch.randn(1, shape[1], dtype=torch.bfloat16, requires_grad=True)
        other = peer.prepare("linear", shape, torch.bfloat16, False)
        return duration(
            metric, size(shape), alternate(lambda: quantized_linear(x, held), other, rounds), "bitsandbytes", 10
        )

    def many_tokens(metric: str) -> Row:
        # In the dtype that training computes in: torch's bf16 product takes 200 times as long without native support.
        dtype = native_dtype(torch.device("cpu"))
        weight = torch.randn(shape, dtype=dtype)
        held = entrenar.quantize_4bit(weight, format="nf4")
        x = torch.randn(512, shape[1], dtype=dtype, requires_grad=True)
        grad = torch.randn(512, shape[0], dtype=dtype)
        ours = lambda: torch.autograd.grad(quantized_linear(x, held), x, grad)  # noqa: E731
        dense = lambda: torch.autograd.grad(torch.nn.functional.linear(x, weight), x, grad)  # noqa: E731
        return duration(metric, size(shape), alternate(ours, timed(dense), rounds), f"{dtype} weight", 0.92)

    yield "linear_nf4_1_token", one_token
    yield "linear_nf4_512_tokens", many_tokens


def gguf_rows(shape: Shape, _: PeerProcess, rounds: int) -> Iterator[tuple[str, Callable[[str], Row]]]:
    """Weights to GGUF blocks, as llama.cpp makes them; its library runs in this process."""
    for type, limit in (("q4_k", 1.0), ("q6_k", 1.0), ("q8_0", 1.5), ("q4_0", 1.5)):

        def measure(metric: str, type: str = type, limit: float = limit) -> Row:
            weight = torch.randn(shape)
            theirs = llama_cpp_quantizer(weight, torch.empty_like(quantize_gguf(weight, type)), type)
            times = alternate(lambda: quantize_gguf(weight, type), timed(theirs), min(rounds, 7))
            return rate(metric, size(shape), weight.numel(), times, "llama.cpp", limit)

        yield f"quantize_gguf_{type}", measure


# To add kernels: a generator (shape, peer, rounds) → (metric, measure), and its name here.
GROUPS = (quantize_rows, dequantize_rows, linear_rows, gguf_rows)


def measures(peer: PeerProcess, rounds: int) -> Iterator[tuple[str, Callable[[str], Row]]]:
    """Every row of the table: the groups over the shapes of weights, then those with shapes of their own."""
    for group in GROUPS:
        for shape in SHAPES:
            yield from group(shape, peer, rounds)
    yield from elementwise_rows(rounds)


def size(shape: Shape) -> str:
    """As the table shows it."""
    return f"{shape[0]}x{shape[1]}"


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    options = arguments(__doc__ or "")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    with PeerProcess(bitsandbytes_work) as peer:
        rows = [measure(metric) for metric, measure in measures(peer, options.rounds) if options.only in metric]
    print(f"kernels: {native.path()}; torch {torch.__version__}; {THREADS} threads; median of {options.rounds}")
    report(rows, options.json)


if __name__ == "__main__":
    main()
