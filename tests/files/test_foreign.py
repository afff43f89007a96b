"""Weights that other tools quantized are recognised by their tensors, and good files are never taken for such."""

from pathlib import Path
from typing import Any

import pytest

from entrenar.core.errors import InputError
from entrenar.files.foreign import refuse_foreign
from entrenar.files.safetensors import TensorInfo
from entrenar.files.stored_tensor import FileVersion

Tensors = dict[str, tuple[str, tuple[int, ...]]]
NOWHERE = FileVersion(Path("nowhere"), ())
OUT, IN = 64, 96
WEIGHT = "model.layers.0.mlp.up_proj"
EMBEDDING: Tensors = {"model.embed_tokens.weight": ("BF16", (420, IN)), f"{WEIGHT}.bias": ("BF16", (OUT,))}

# What each tool's files hold for one linear layer (OUT, IN) of 4 or 8 bits, from their documentation and converters.
FOREIGN: dict[str, tuple[str, Tensors]] = {
    "gptq": ("gptq", {
        ".qweight": ("I32", (IN // 8, OUT)), ".qzeros": ("I32", (1, OUT // 8)), ".scales": ("F16", (1, OUT)),
        ".g_idx": ("I32", (IN,))}),
    "gptq without g_idx": ("gptq", {
        ".qweight": ("I32", (IN // 8, OUT)), ".qzeros": ("I32", (1, OUT // 8)), ".scales": ("F16", (1, OUT))}),
    "awq": ("awq", {
        ".qweight": ("I32", (IN, OUT // 8)), ".qzeros": ("I32", (1, OUT // 8)), ".scales": ("F16", (1, OUT))}),
    "mlx": ("mlx", {".weight": ("U32", (OUT, IN // 8)), ".scales": ("BF16", (OUT, 1)), ".biases": ("BF16", (OUT, 1))}),
    "mlx mxfp4": ("mlx", {".weight": ("U32", (OUT, IN // 8)), ".scales": ("U8", (OUT, 3))}),
    "fp8 blocks": ("fp8 blocks", {".weight": ("F8_E4M3", (OUT, IN)), ".weight_scale_inv": ("F32", (1, 1))}),
    "fp8 as DeepSeek": ("fp8", {".weight": ("F8_E4M3", (OUT, IN)), ".scale": ("F8_E8M0", (1, 1))}),
    "early fp8": ("fp8", {".weight": ("F8_E4M3", (OUT, IN)), ".weight_scale": ("F32", ())}),
    "quark": ("fp8", {".weight": ("F8_E4M3", (OUT, IN)), ".weight_quantizer.scale": ("F32", ())}),
    "mistral": ("mistral's fp8", {
        ".weight": ("F8_E4M3", (OUT, IN)), ".qscale_weight": ("F32", ()), ".qscale_act": ("F32", ())}),
    "experts in fp8": ("fp8", {".gate_up_proj": ("F8_E5M2", (2, OUT, IN)), ".gate_up_proj_scale_inv": ("F32", (2, 1))}),
    "modelopt fp8": ("modelopt fp8", {
        ".weight": ("F8_E4M3", (OUT, IN)), ".weight_scale": ("F32", ()), ".input_scale": ("F32", ())}),
    "modelopt nvfp4": ("modelopt nvfp4", {
        ".weight": ("U8", (OUT, IN // 2)), ".weight_scale": ("F8_E4M3", (OUT, 6)), ".weight_scale_2": ("F32", ())}),
    "compressed-tensors": ("compressed-tensors", {
        ".weight_packed": ("I32", (OUT, IN // 8)), ".weight_scale": ("BF16", (OUT, 1)),
        ".weight_shape": ("I64", (2,))}),
    "compressed-tensors int8": ("compressed-tensors int8", {
        ".weight": ("I8", (OUT, IN)), ".weight_scale": ("BF16", (OUT, 1))}),
    "mxfp4": ("mxfp4", {".down_proj_blocks": ("U8", (4, OUT, 3, 16)), ".down_proj_scales": ("U8", (4, OUT, 3))}),
    "hqq": ("hqq", {".W_q": ("U8", (OUT // 2, IN)), ".scale": ("F16", (OUT, 1)), ".zero": ("F16", (OUT, 1))}),
    "hqq held as floats": ("hqq", {".W_q": ("BF16", (OUT, IN)), ".scale": ("F16", (OUT, 1)), ".zero": ("F16", (1, 1))}),
    "eetq": ("eetq", {".weight": ("I8", (IN, OUT)), ".weight_scales": ("F16", (OUT,))}),
    "torchao": ("torchao", {"._weight_qdata": ("I8", (OUT, IN)), "._weight_scale": ("F32", (OUT, 1))}),
    "quanto": ("quanto", {".weight._data": ("I8", (OUT, IN)), ".weight._scale": ("BF16", (OUT, 1))}),
    "bitnet": ("bitnet", {".weight": ("U8", (OUT // 4, IN)), ".weight_scale": ("BF16", (1,))}),
    "exl2": ("exl2", {".q_weight": ("I32", (IN // 8, OUT)), ".q_scale": ("I32", (1, OUT // 8))}),
    "exl3": ("exl3", {".trellis": ("I16", (6, 4, 48)), ".suh": ("F16", (IN,)), ".svh": ("F16", (OUT,))}),
    "aqlm": ("aqlm", {
        ".codes": ("I8", (OUT, 12, 1)), ".codebooks": ("F16", (1, 256, 1, 8)), ".scales": ("F16", (OUT, 1, 1, 1))}),
    "no tool known here": ("something that is not known here", {".weight": ("I8", (OUT, IN))}),
    "bitsandbytes without its state": ("something that is not known here", {
        ".weight": ("U8", (OUT * IN // 2, 1)), ".weight.absmax": ("F32", (96,))}),
    "experts in int8": ("something that is not known here", {
        ".down_proj": ("I8", (2, OUT, IN)), ".down_proj_scale": ("F32", (2, OUT))}),
}  # fmt: skip
GOOD: dict[str, Tensors] = {
    "floats": {".weight": ("F32", (OUT, IN))},
    "tensors that happen to be called so": {
        ".weight": ("BF16", (OUT, IN)), ".scales": ("BF16", (OUT, 1)), ".biases": ("BF16", (OUT,)),
        ".qweight": ("F32", (OUT, IN)), ".weight_scale": ("F32", ()), ".codes": ("F16", (2, 2))},
    "merely stored as fp8": {".weight": ("F8_E4M3", (OUT, IN)), ".bias": ("F8_E4M3", (OUT,))},
    "nf4 of bitsandbytes": {
        ".weight": ("U8", (OUT * IN // 2, 1)), ".weight.absmax": ("U8", (96,)), ".weight.quant_map": ("F32", (16,)),
        ".weight.nested_absmax": ("F32", (1,)), ".weight.nested_quant_map": ("F32", (256,)),
        ".weight.quant_state.bitsandbytes__nf4": ("U8", (90,))},
    "nf4 of bitsandbytes, stored as floats": {
        ".weight": ("BF16", (OUT * IN // 4, 1)), ".weight.absmax": ("F32", (96,)), ".weight.quant_map": ("F32", (16,)),
        ".weight.quant_state.bitsandbytes__fp4": ("U8", (90,))},
    "LLM.int8": {".weight": ("I8", (OUT, IN)), ".SCB": ("F32", (OUT,)), ".weight_format": ("U8", ())},
    "buffers": {
        ".weight": ("BF16", (OUT, IN)), ".position_ids": ("I64", (1, 512)), ".num_batches_tracked": ("I64", ()),
        ".mask_scale": ("F32", ()), ".attn.bias": ("U8", (1, 1, 256, 256)), ".layer_scalar": ("BF16", (1,))},
}  # fmt: skip


def refuse(tensors: Tensors, config: dict[str, Any]) -> None:
    named = EMBEDDING | {f"{WEIGHT}{leaf}": held for leaf, held in tensors.items()}
    infos = {name: TensorInfo(NOWHERE, dtype, shape, 0, 0) for name, (dtype, shape) in named.items()}
    refuse_foreign(Path("there"), config, infos)


@pytest.mark.parametrize("case", FOREIGN)
def test_the_tool_is_named_though_the_config_says_nothing(case: str) -> None:
    tool, tensors = FOREIGN[case]
    with pytest.raises(InputError, match=f"^there is quantized as {tool}, which is not read .*take the original"):
        refuse(tensors, {})


@pytest.mark.parametrize(("config", "tool"), [
    ({"quantization_config": {"quant_method": "auto-round", "bits": 4}}, "auto-round"),
    ({"compression_config": {"quant_method": "sparseml"}}, "sparseml"),
    ({"text_config": {"quantization_config": {"quant_method": "fouroversix"}}}, "fouroversix"),
    ({"quantization": {"bits": 4, "group_size": 64}}, "mlx"),
])  # fmt: skip
def test_the_config_knows_the_tool_better(config: dict[str, Any], tool: str) -> None:
    with pytest.raises(InputError, match=f"quantized as {tool}, which"):
        refuse(FOREIGN["gptq"][1], config)
    with pytest.raises(InputError, match=f"quantized as {tool} by its config.json, but its tensors are plain numbers"):
        refuse(GOOD["floats"], config)


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("config", [
    {}, {"quantization_config": None}, {"quantization_config": {}}, {"quantization_config": 3},
    {"quantization_config": {"quant_method": "bitsandbytes"}}, {"quantization_config": {"load_in_4bit": True}},
    {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}},
])  # fmt: skip
def test_good_files_are_let_through(case: str, config: dict[str, Any]) -> None:
    refuse(GOOD[case], config)
