"""The dtype of the computation: bfloat16 only where the machine has it natively."""

import pytest
import torch

from entrenar.core.errors import InputError
from entrenar.models import compute
from entrenar.models.compute import native_dtype, resolve_dtype


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_name_is_torchs_dtype(name: str, dtype: torch.dtype) -> None:
    assert resolve_dtype(name) is dtype


def test_auto_is_the_machines_own() -> None:
    assert resolve_dtype("auto") is native_dtype()


@pytest.mark.parametrize("name", ["float64", "bf16", "", "AUTO"])
def test_an_unknown_name_is_an_input_error_that_lists_the_known(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}': choose auto, float32, bfloat16, float16"):
        resolve_dtype(name)


@pytest.mark.parametrize(("avx512", "amx", "expected"), [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (True, True, torch.bfloat16),
    (False, False, torch.float32),
])  # fmt: skip
def test_a_cpu_computes_in_bfloat16_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype
) -> None:
    """mkldnn alone says yes on AVX-512 without BF16, where it emulates."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute.native_dtype() is expected


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_computes_in_bfloat16_where_it_can(
    monkeypatch: pytest.MonkeyPatch, supported: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert compute.native_dtype() is expected
