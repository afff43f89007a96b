"""Triton's kernels without a GPU: their numbers in Triton's interpreter, and that its compiler takes them.

`make interop` sets TRITON_INTERPRET, which Triton reads when it is imported; compiling wants it unset.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entrenar.ops import gpu_kernels
from entrenar.ops import registration as library
from entrenar.ops.codebook import dequantize as dequantize_codebook
from entrenar.ops.cross_entropy import operation as cross_entropy
from entrenar.ops.elementwise import gated_activation, rms_norm, rotary
from tests.support.triton_kernels import (
    DTYPES,
    Triton,
    test_a_norm_of_what_does_not_lie_together,
    test_cross_entropy,
    test_cross_entropy_of_what_is_no_number,
    test_decoding,
    test_gated_activations,
    test_norms,
    test_rotations,
)

__all__ = [
    "test_a_norm_of_what_does_not_lie_together",
    "test_cross_entropy",
    "test_cross_entropy_of_what_is_no_number",
    "test_decoding",
    "test_gated_activations",
    "test_norms",
    "test_rotations",
]
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]  # NumPy's


@pytest.fixture
def triton() -> Triton:
    assert os.environ.get("TRITON_INTERPRET") == "1", "run this by `make interop`"
    kernels = {
        "rms_norm": rms_norm._gpu,
        "rms_norm_backward": rms_norm._backward_gpu,
        "gated_activation": gated_activation._gpu,
        "gated_activation_backward": gated_activation._backward_gpu,
        "rotary": rotary._gpu,
        "cross_entropy_losses": cross_entropy._losses_gpu,
        "cross_entropy_rows": cross_entropy._rows_gpu,
        "dequantize_codebook": dequantize_codebook._fresh(dequantize_codebook._gpu_into),
    }

    def run(name: str, *args: Any) -> Any:
        return kernels[name](*args)

    return Triton("cpu", run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(name for name, one in library._OPERATIONS.items() if one.gpu))
def test_kernels_pass_the_trial_by_which_they_serve(
    name: str, dtype: torch.dtype, triton: Triton, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_kernels, "are_there", lambda: True)
    operation = library._OPERATIONS[name]
    assert operation.gpu is not None
    decodes = name.startswith("dequantize")  # its codebook is float32, whatever its result is

    def typed(one: Any, last: bool) -> Any:
        if isinstance(one, torch.dtype):
            return dtype
        return one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() and (last or not decodes) else one

    *first, last = operation.gpu.samples(torch.device(triton.device))[-1]
    args = (*(typed(one, last=False) for one in first), typed(last, last=True))
    assert gpu_kernels.serves(name, operation.gpu, operation.reference, args), caplog.text


@pytest.mark.parametrize("capability", [80, 90])
def test_the_compiler_takes_every_kernel(capability: int, tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "support" / "compile_triton.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) > 25
