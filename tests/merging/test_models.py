"""Inputs: adapters added as they are read, files told apart, types widened."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from entrenar.core.errors import InputError
from entrenar.files.peft import AdapterTensors, PeftAdapter, write_adapter
from entrenar.merging.layers import split_layer
from entrenar.merging.models import open_input
from entrenar.merging.stack import Scratch
from tests.support.models_on_disk import HIDDEN, tensors, write_model

Q = "model.layers.1.self_attn.q_proj"


def adapter(rows: int = HIDDEN, **changes: Any) -> PeftAdapter:
    a, b = torch.randn(2, HIDDEN), torch.randn(rows, 2)
    return PeftAdapter(
        rank=2, alpha=6.0, dropout=0.0, targets=[Q], base_model=None, base_format=None,
        tensors=AdapterTensors({Q: {"lora_A.weight": a, "lora_B.weight": b}}), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("count", [5, HIDDEN, 23, HIDDEN * HIDDEN])
def test_an_adapter_is_added_piece_by_piece(tmp_path: Path, count: int) -> None:
    values, lora = tensors(1, dtype=torch.bfloat16), adapter()
    path = write_model(tmp_path / "model", values)
    write_adapter(tmp_path / "adapter", lora)
    tensor = open_input(f"{path}+{tmp_path / 'adapter'}").tensors[f"{Q}.weight"]
    a, b = lora.factors[Q]
    expected = (values[f"{Q}.weight"].float() + 3.0 * b @ a).view(-1)
    scratch = Scratch()
    for start in range(0, HIDDEN * HIDDEN, count):
        size = min(count, HIDDEN * HIDDEN - start)
        torch.testing.assert_close(tensor.source.read(start, size, scratch, 0), expected[start : start + size])
    assert tensor.dtype == torch.bfloat16


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", tensors(1))
    write_adapter(tmp_path / "adapter", adapter(rows=5))
    with pytest.raises(InputError, match="has A and B of shapes"):
        open_input(f"{path}+{tmp_path / 'adapter'}")


@pytest.mark.parametrize(
    ("changes", "scale"), [({"rslora": True}, 6.0 / 2**0.5), ({"alpha_pattern": {"q_proj": 8.0}}, 4.0)]
)
def test_the_scale_is_the_layers_own(tmp_path: Path, changes: dict[str, Any], scale: float) -> None:
    values, lora = tensors(1), adapter(**changes)
    path = write_model(tmp_path / "model", values)
    write_adapter(tmp_path / "adapter", lora)
    source = open_input(f"{path}+{tmp_path / 'adapter'}").tensors[f"{Q}.weight"].source
    a, b = lora.factors[Q]
    found = source.read(0, HIDDEN * HIDDEN, Scratch(), 0)
    torch.testing.assert_close(found, (values[f"{Q}.weight"].float() + scale * b @ a).view(-1))


def test_what_is_more_than_lora_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", tensors(1))
    write_adapter(tmp_path / "adapter", adapter(init="pissa"))
    with pytest.raises(InputError, match="more than W"):
        open_input(f"{path}+{tmp_path / 'adapter'}")


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    same = [open_input(write_model(tmp_path / name, tensors(1))).fingerprint for name in "ab"]
    assert same[0] == same[1]
    assert open_input(write_model(tmp_path / "c", tensors(2))).fingerprint != same[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_any_float_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {name: tensor.to(dtype) for name, tensor in tensors(1).items()}
    path = write_model(tmp_path / "model", tensors(1))
    save_file(values, Path(path) / "model.safetensors")
    source = open_input(path).tensors["model.norm.weight"].source
    found = source.read(0, HIDDEN, Scratch(), 0)
    assert found.dtype == source.dtype
    assert torch.equal(found.double(), values["model.norm.weight"].double())


def test_a_gguf_is_a_model_too(smollm2: Path) -> None:
    model = open_input(str(smollm2))
    assert model.layers == 30
    tensor = model.tensors["model.layers.0.self_attn.q_proj.weight"]
    step = tensor.source.step
    assert tensor.source.read(step, step, Scratch(), 0).isfinite().all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.up_proj.weight", ("model.layers.", 12, ".mlp.up_proj.weight")),
        ("transformer.h.0.ln_1.bias", ("transformer.h.", 0, ".ln_1.bias")), ("lm_head.weight", None),
    ],
)  # fmt: skip
def test_layers_are_known_by_their_names(name: str, expected: object) -> None:
    assert split_layer(name) == expected


def test_what_is_not_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no model.safetensors"):
        open_input(str(tmp_path))
    path = Path(write_model(tmp_path / "quantized", tensors(1)))
    (path / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}')
    with pytest.raises(InputError, match="hqq"):
        open_input(str(path))
