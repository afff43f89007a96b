"""Where a model computes, and its dtype: bfloat16 only where the machine has it natively."""

import pytest
import torch

from entrenar.core.errors import InputError
from entrenar.opening.compute import native_dtype, resolve_device, resolve_dtype

_CPU, _GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_name_is_torchs_dtype(name: str, dtype: torch.dtype) -> None:
    assert resolve_dtype(name, _CPU) is dtype


def test_auto_is_the_machines_own() -> None:
    assert resolve_dtype("auto", _CPU) is native_dtype(_CPU)


@pytest.mark.parametrize("name", ["float64", "bf16", "", "AUTO"])
def test_an_unknown_name_is_an_input_error_that_lists_the_known(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}': choose auto, float32, bfloat16, float16"):
        resolve_dtype(name, _CPU)


@pytest.mark.parametrize(("avx512", "amx", "expected"), [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (True, True, torch.bfloat16),
    (False, False, torch.float32),
])  # fmt: skip
def test_a_cpu_computes_in_bfloat16_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype
) -> None:
    """mkldnn alone says yes on AVX-512 without BF16, where it emulates."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert native_dtype(_CPU) is expected


@pytest.mark.parametrize(("capability", "expected"), [
    ((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float32),
])  # fmt: skip
def test_a_gpu_computes_in_bfloat16_where_it_can(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    """torch's own is_bf16_supported counts emulation."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert native_dtype(_GPU) is expected


@pytest.mark.parametrize(("name", "gpus", "expected"), [
    ("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1"),
])  # fmt: skip
def test_a_device_by_name(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(("name", "message"), [
    ("gpu", "unknown device 'gpu': choose auto, cpu, cuda or cuda:N"),
    ("cuda:-1", "unknown device 'cuda:-1'"),
    ("cuda:1", "cuda:1 is not there, torch sees 1 GPUs: choose auto or cpu"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_an_input_error(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=message):
        resolve_device(name)
