"""bitsandbytes' checkpoints: what transformers writes is read here without a change, and the reverse."""

from pathlib import Path
from typing import Any

import bitsandbytes.functional as functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.files.bitsandbytes import BitsandbytesWeights
from entrenar.files.safetensors import SafetensorsCheckpoint
from entrenar.layers.quantized_linear import QuantizedLinear
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.recipes.export import export
from entrenar.recipes.merge import merge

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
IDS = torch.tensor([[1, 40, 80, 120, 7, 9, 200]])


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.fixture(params=["nf4", "fp4 nested"])
def theirs(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A 4-bit directory as transformers and bitsandbytes write it."""
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=request.param[:3], bnb_4bit_use_double_quant="nested" in request.param,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=options, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_their_checkpoint_is_held_byte_by_byte(theirs: Path) -> None:
    model, _ = load(str(theirs), dtype="float32")
    stored = load_file(theirs / "model.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.get_parameter("weight_codes"), stored[f"{name}.weight"].view(-1))
    # In evaluation mode bitsandbytes rounds to bfloat16, scales included, where the CPU has AVX512-BF16.
    peer = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).train()
    torch.testing.assert_close(logits(model), logits(peer), atol=1e-4, rtol=1e-4)


def test_another_format_is_not_laid_over_theirs(theirs: Path) -> None:
    with pytest.raises(InputError, match="quantized as"):
        load(str(theirs), "int4")


def test_an_adapter_on_their_base_is_fused_with_it(theirs: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = load(str(theirs), dtype="float32")
    attach_lora(model, rank=4)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.05)
    save_adapter(model, tmp_path / "adapter")
    path = export(str(theirs), tmp_path / "out", adapter=str(tmp_path / "adapter"), type="f32")
    torch.testing.assert_close(logits(load(str(path), dtype="float32")[0]), logits(model), atol=1e-4, rtol=1e-4)
    for _, layer in adapted_layers(model):
        layer.lora_b.data *= 0.001  # what 4 bits of a dequantized base round away
    save_adapter(model, tmp_path / "small")
    with pytest.raises(InputError, match="lossy"):
        export(str(theirs), tmp_path / "four", adapter=str(tmp_path / "small"), type="nf4")


def test_their_checkpoint_is_merged_as_what_they_dequantize_it_to(theirs: Path, tmp_path: Path) -> None:
    models = [{"model": str(theirs), "parameters": {"weight": 1.0}}]
    merge({"merge_method": "linear", "models": models, "dtype": "float32"}, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    peer = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    modules = dict(peer.named_modules())
    quantized = {n: m for n, m in modules.items() if hasattr(getattr(m, "weight", None), "quant_state")}
    assert len(quantized) == 14
    for name, module in quantized.items():
        weight: Any = module.weight
        expected = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=0, atol=0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_our_nf4_is_loaded_by_them_to_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = export(str(tiny_model_dir), tmp_path / "ours", type="nf4")
    peer = AutoModelForCausalLM.from_pretrained(path)
    ours, _ = load(str(path), dtype="bfloat16")
    stored = load_file(path / "model.safetensors")
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight: Any = peer.get_submodule(name).weight
        assert torch.equal(weight.data.view(-1), stored[f"{name}.weight"].view(-1))
        value = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(value, layer.quantized_weight.dequantize(torch.bfloat16))
    torch.testing.assert_close(logits(peer), logits(ours), atol=0.1, rtol=0.1)
    again = export(str(path), tmp_path / "again", type="f32")
    assert torch.equal(
        load_file(again / "model.safetensors")["model.layers.0.mlp.up_proj.weight"],
        layers["model.layers.0.mlp.up_proj"].quantized_weight.dequantize(),
    )


def test_llm_int8_is_read_row_by_row(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=options, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "theirs")
    ours, _ = load(str(tmp_path / "theirs"), dtype="float32")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    layer = ours.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    expected = stored[f"{name}.weight"].float() * stored[f"{name}.SCB"][:, None] / 127
    torch.testing.assert_close(layer.dequantized(), expected)


def test_a_codebook_of_its_own_is_refused(theirs: Path) -> None:
    file = theirs / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight.quant_map"] *= 0.5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match="codebook of its own"):
        load(str(theirs))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_are_bytes_whatever_they_are_stored_as(
    storage: torch.dtype, format: str, nested: bool, tmp_path: Path
) -> None:
    """`quant_storage`, which FSDP needs; whole, and from any element on, as a merge reads it. Right: bitsandbytes."""
    for block_size in (64, 128, 1024, 4096):
        weight = torch.randn(136, 1024, generator=torch.Generator().manual_seed(block_size))
        packed, state = functional.quantize_4bit(
            weight, blocksize=block_size, compress_statistics=nested, quant_type=format, quant_storage=storage
        )
        expected = functional.dequantize_4bit(packed, state).view(-1)
        beside = {f"x.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        save_file({"x.weight": packed} | beside, tmp_path / "model.safetensors")
        weights = BitsandbytesWeights(SafetensorsCheckpoint(tmp_path))
        assert weights.formats() == {"x.weight": (format, (136, 1024))}
        held = weights.weight("x.weight").read()
        assert held.memory_bytes == weights.bytes_of("x.weight") < 0.8 * weight.numel()
        torch.testing.assert_close(held.dequantize().view(-1), expected, atol=1e-6, rtol=1e-6)
        for start, count in ((0, 7), (5, 70_001), (65_536, 65_536), (139_263, 1)):
            piece = weights.weight("x.weight").read_range(start, count)
            torch.testing.assert_close(piece, expected[start : start + count], atol=1e-6, rtol=1e-6)


def test_a_directory_stored_as_floats_is_loaded_exported_and_merged_as_bitsandbytes_dequantizes_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=options, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "theirs")
    layer: Any = theirs.get_submodule("model.layers.0.mlp.up_proj")
    expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    name = "model.layers.0.mlp.up_proj.weight"
    assert load_file(tmp_path / "theirs" / "model.safetensors")[name].dtype == torch.bfloat16

    model, _ = load(str(tmp_path / "theirs"), dtype="float32")
    held = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(held, QuantizedLinear)
    torch.testing.assert_close(held.dequantized(), expected, atol=1e-6, rtol=1e-6)
    export(str(tmp_path / "theirs"), str(tmp_path / "plain"), type="f32")
    torch.testing.assert_close(load_file(tmp_path / "plain" / "model.safetensors")[name], expected, atol=1e-6, rtol=0)
    models = [{"model": str(tmp_path / "theirs"), "parameters": {"weight": 1}}]
    merge({"merge_method": "linear", "models": models, "dtype": "float32"}, str(tmp_path / "merged"))
    torch.testing.assert_close(load_file(tmp_path / "merged" / "model.safetensors")[name], expected, atol=1e-6, rtol=0)
