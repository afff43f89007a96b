"""The native library: how it is found, chosen and refused; threads, forks, guards around every buffer."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from entrenar import native
from entrenar.core.errors import InputError
from entrenar.ops.codebook.dequantize import dequantize_codebook_into
from entrenar.ops.linear.multiply import codebook_weight, int8_weight
from tests.support.all_kernels import CODEBOOK, everything
from tests.support.guards import assert_guard, guarded
from tests.support.samples import DTYPES, gaussian

NATIVE = [path for path in native.supported_paths() if path != "reference"]
needs_library = pytest.mark.skipif(not NATIVE, reason="the native library is not built")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that runs `code`."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


SHOW = """
import logging; logging.basicConfig(level=logging.INFO)
from entrenar import native
from entrenar.core.errors import InputError
try: print(native.path(), native.available())
except InputError as error: print("refused:", error)
"""


@pytest.mark.parametrize("path", native.supported_paths())
def test_the_environment_forces_a_path(path: str) -> None:
    assert run(SHOW, ENTRENAR_KERNELS=path).stdout == f"{path} {path != 'reference'}\n"


def test_an_unknown_path_in_the_environment_is_refused_with_the_known_ones() -> None:
    found = run(SHOW, ENTRENAR_KERNELS="sse9").stdout
    assert found.startswith("refused: ENTRENAR_KERNELS is 'sse9'")
    assert "reference, generic, avx2, avx512" in found


def test_without_a_library_the_reference_serves_and_one_line_says_so() -> None:
    hidden = (
        "from entrenar.native import library; library._NAME = 'absent.so'" + SHOW + "native.path(); native.available()"
    )
    found = run(hidden, ENTRENAR_LIBRARY="", ENTRENAR_KERNELS="")
    assert found.stdout == "reference False\n"
    assert found.stderr.count("the native kernels are not built") == 1


def test_without_a_library_a_forced_path_is_refused() -> None:
    hidden = "from entrenar.native import library; library._NAME = 'absent.so'" + SHOW
    assert "not built" in run(hidden, ENTRENAR_LIBRARY="", ENTRENAR_KERNELS="generic").stdout


def test_a_library_that_is_not_there_is_refused_by_name() -> None:
    assert "'/nowhere.so', which is not a file" in run(SHOW, ENTRENAR_LIBRARY="/nowhere.so").stdout


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(InputError, match="unknown kernel path 'sse9'"):
        native.set_path("sse9")


@needs_library
@pytest.mark.skipif("neon" in NATIVE, reason="an ARM machine")
def test_a_path_of_another_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="this CPU cannot run the neon kernels"):
        native.set_path("neon")
    assert native.available()


MALLOC = """
import torch
from entrenar import native
from entrenar.core.memory import anonymous_bytes
native.path()
before = anonymous_bytes()
held = torch.ones(50_000_000)
del held
print(anonymous_bytes() - before > 150_000_000)
"""


@needs_library
@pytest.mark.skipif(not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"), reason="not glibc")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has its own malloc")
def test_freed_memory_stays_with_the_process_unless_the_user_says_otherwise() -> None:
    assert run(MALLOC, ENTRENAR_MALLOC="").stdout == "True\n"
    assert run(MALLOC, ENTRENAR_MALLOC="default").stdout == "False\n"


HUGE_PAGES = """
import re
import torch
from entrenar import native
from entrenar.ops.codebook.quantize import quantize_codebook
native.use_huge_pages()
held = [torch.empty(4_000_000) for _ in range(8)]
quantize_codebook(torch.zeros(1 << 20), torch.linspace(-1, 1, 16), 64)
heaps = re.findall(r"\\[heap\\]\\n(?:.+ kB\\n|.+: +[0-9]\\n)*VmFlags: (.+)", open("/proc/self/smaps").read())
print(any("hg" in flags.split() for flags in heaps))
"""


@needs_library
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
@pytest.mark.skipif(not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"), reason="not glibc")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has its own malloc")
def test_training_asks_for_huge_pages_unless_the_user_says_otherwise() -> None:
    assert run(HUGE_PAGES, ENTRENAR_MALLOC="").stdout == "True\n"
    assert run(HUGE_PAGES, ENTRENAR_MALLOC="default").stdout == "False\n"


@needs_library
def test_one_thread_and_many_give_the_same_bytes(kernel_path: str) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    if kernel_path != "reference":  # torch's own matmul makes no such promise
        assert found[0] == found[1] == found[2]


@needs_library
def test_eight_python_threads_at_once(kernel_path: str) -> None:
    expected = [everything(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(everything, range(8))) == expected


FORK = """
import os, sys, torch
from tests.support.all_kernels import everything
from entrenar import native
from entrenar.native import library
native.set_path(sys.argv[1]) if len(sys.argv) > 1 else None
if %s: library.loaded().entrenar_use_gomp(None)
torch.set_num_threads(2)
before = everything()
pid = os.fork()
if pid == 0:
    os._exit(0 if everything() == before else 7)
status = os.waitpid(pid, 0)[1]
print(status, everything() == before)
"""


@needs_library
@pytest.mark.parametrize("own_pool", [False, True])
def test_a_forked_child_computes_the_same_bytes_and_so_does_its_parent(own_pool: bool) -> None:
    found = run(FORK % own_pool)
    assert found.stdout == "0 True\n", found.stderr


@needs_library
def test_our_own_threads_give_the_same_bytes_as_torchs() -> None:
    script = """
import torch; torch.set_num_threads(3)
from concurrent.futures import ThreadPoolExecutor
from tests.support.all_kernels import everything
from entrenar.native import library
before = [everything(seed) for seed in range(8)]
library.loaded().entrenar_use_gomp(None)
print([everything(seed) for seed in range(8)] == before)
with ThreadPoolExecutor(8) as pool: print(list(pool.map(everything, range(8))) == before)
"""
    found = run(script)
    assert found.stdout == "True\nTrue\n", found.stderr


@needs_library
@pytest.mark.parametrize("path", NATIVE)
@pytest.mark.parametrize("count", [1, 2, 15, 17, 33, 64, 65, 100, 4304])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_writes_outside_its_buffers(path: str, count: int, dtype: torch.dtype) -> None:
    flat, number = gaussian(count, dtype), native.DTYPES[dtype]
    codes, codes_raw = guarded(-(-count // 2), torch.uint8)
    absmax, absmax_raw = guarded(-(-count // 64), torch.float32)
    bytes_, bytes_raw = guarded(count, torch.uint8)
    out, out_raw = guarded(count, dtype)
    nested, nested_raw = guarded(absmax.numel(), torch.uint8)
    group, group_raw = guarded(1, torch.float32)
    y, y_raw = guarded(3 * 2, dtype)
    x = gaussian(3 * count, dtype)
    with native.using(path):
        native.Function("quantize_symmetric")(flat, bytes_, absmax, count, 64, 127, number, 2)
        native.Function("dequantize_int8")(bytes_, absmax, None, None, None, out, count, 64, number, 2)
        native.Function("quantize_symmetric")(flat, codes, absmax, count, 64, 7, number, 2)
        native.Function("nest_scales")(absmax, None, None, nested, group, absmax.numel(), 2)
        native.Function("quantize_codebook")(flat, CODEBOOK, codes, absmax, count, 64, number, 2)
        dequantize_codebook_into(codes, [absmax], CODEBOOK, 64, out)
        two_rows = torch.cat([codes, codes, codes])
        scales = torch.ones(-(-2 * count // 64))
        weight = codebook_weight(two_rows, [scales], CODEBOOK, 64, (2, count))
        LINEAR(ctypes.addressof(weight.view), x, None, y, 3, number, 2)
        LINEAR_BACKWARD(ctypes.addressof(weight.view), y, out, 1, number, 2)
    for raw in (codes_raw, absmax_raw, bytes_raw, out_raw, nested_raw, group_raw, y_raw):
        assert_guard(raw)


QUANTIZE = native.Function("quantize_codebook")
DEQUANTIZE = native.Function("dequantize_codebook")
INT8 = native.Function("dequantize_int8")
SYMMETRIC = native.Function("quantize_symmetric")
LINEAR = native.Function("linear_codebook")
LINEAR_BACKWARD = native.Function("linear_codebook_backward")
PANEL = native.Function("dequantize_codebook_panel")
NEST = native.Function("nest_scales")


@needs_library
@pytest.mark.parametrize("count", [-1, -(2**63), 129, 2**31, 2**62, 2**63 - 1])
def test_a_count_that_is_negative_overflows_or_exceeds_a_buffer_is_an_error(count: int) -> None:
    """Buffers for 128 elements."""
    flat, codes, scales, eight = torch.zeros(128), torch.zeros(64, dtype=torch.uint8), torch.zeros(2), torch.zeros(128)

    def linear(rows: int, columns: int, tokens: int, backward: bool = False) -> None:
        weight = codebook_weight(codes, [scales], CODEBOOK, 64, (rows, columns))
        view = ctypes.addressof(weight.view)
        LINEAR_BACKWARD(view, scales, flat, tokens, 0, 2) if backward else LINEAR(
            view, flat, None, scales, tokens, 0, 2
        )

    for call in (
        lambda: QUANTIZE(flat, CODEBOOK, codes, scales, count, 64, 0, 2),
        lambda: DEQUANTIZE(codes, scales, None, None, None, CODEBOOK, flat, count, 64, 0, 2),
        lambda: SYMMETRIC(flat, codes, scales, count, 64, 7, 0, 2),
        lambda: INT8(eight.view(torch.uint8)[:128], scales, None, None, None, flat, count, 64, 0, 2),
        lambda: NEST(scales, None, None, codes[:2], scales[:1], count, 2),
        *(
            partial(linear, *sizes, backward=backward)
            for sizes in ((2, count, 1), (count, 64, 1), (2, 64, count))
            for backward in (False, True)
        ),
        lambda: PANEL(codes, scales, None, None, None, CODEBOOK, flat, 128, 64, 0, count, 0, 64, 64, 0, 2),
        lambda: PANEL(codes, scales, None, None, None, CODEBOOK, flat, 128, 64, count, 1, 0, 64, 64, 0, 2),
        lambda: PANEL(codes, scales, None, None, None, CODEBOOK, flat, 128, 64, 0, 2, count, 1, 64, 0, 2),
    ):
        with pytest.raises(InputError, match="refused its arguments"):
            call()


@needs_library
def test_a_layer_of_few_tokens_of_any_dtype_is_of_four_bits() -> None:
    weight = int8_weight(torch.zeros(128, dtype=torch.uint8), [torch.zeros(2)], 64, (2, 64))
    for call in (
        lambda view: LINEAR(view, torch.zeros(64), None, torch.zeros(2), 1, 0, 2),
        lambda view: LINEAR_BACKWARD(view, torch.zeros(2), torch.zeros(64), 1, 0, 2),
    ):
        with pytest.raises(InputError, match="an argument is out of range"):
            call(ctypes.addressof(weight.view))


@needs_library
def test_each_buffer_that_is_too_small_is_an_error() -> None:
    whole = [torch.zeros(128), CODEBOOK, torch.zeros(64, dtype=torch.uint8), torch.zeros(2)]
    QUANTIZE(*whole, 128, 64, 0, 2)
    for index in range(4):
        cut = [tensor[:-1] if at == index else tensor for at, tensor in enumerate(whole)]
        with pytest.raises(InputError, match="a buffer is too small"):
            QUANTIZE(*cut, 128, 64, 0, 2)
        missing = [None if at == index else tensor for at, tensor in enumerate(whole)]
        with pytest.raises(InputError, match=r"too small|missing"):
            QUANTIZE(*missing, 128, 64, 0, 2)


@needs_library
def test_a_nested_scale_of_too_few_groups_is_an_error() -> None:
    codes, nested = torch.zeros(300 * 32, dtype=torch.uint8), torch.zeros(300, dtype=torch.uint8)
    out = torch.zeros(300 * 64)
    with pytest.raises(InputError, match="a buffer is too small"):
        DEQUANTIZE(codes, nested, torch.zeros(1), None, None, CODEBOOK, out, 300 * 64, 64, 0, 2)


@needs_library
@pytest.mark.parametrize("block_size", [0, -64, 3, 24])
def test_a_block_size_that_no_kernel_has_is_an_error(block_size: int) -> None:
    with pytest.raises(InputError, match="block size"):
        QUANTIZE(torch.zeros(64), CODEBOOK, torch.zeros(32, dtype=torch.uint8), torch.zeros(64), 64, block_size, 0, 2)


@needs_library
def test_a_dtype_that_no_kernel_has_is_an_error() -> None:
    with pytest.raises(InputError, match="dtype"):
        QUANTIZE(torch.zeros(64), CODEBOOK, torch.zeros(32, dtype=torch.uint8), torch.zeros(1), 64, 64, 3, 2)


def test_a_result_tensor_with_gaps_is_refused() -> None:
    codes, scales = torch.zeros(32, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(InputError, match="contiguous"):
        dequantize_codebook_into(codes, [scales], CODEBOOK, 64, torch.zeros(128)[::2])


@needs_library
def test_scratch_is_one_buffer_a_thread() -> None:
    here = native.scratch(1000, torch.float32).fill_(1)
    assert (here.shape, here.dtype) == ((1000,), torch.float32)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: native.scratch(1000, torch.float32).fill_(2).data_ptr()).result()
    assert there != here.data_ptr()
    assert (here == 1).all()
    assert native.scratch(500, torch.bfloat16).data_ptr() == here.data_ptr()
    for count in (-1, 2**60):
        with pytest.raises(InputError, match="a size is negative or overflows"):
            native.scratch(count, torch.float32)
