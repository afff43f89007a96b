"""Every tensor of an exported GGUF is of the type that llama.cpp's own quantizer gives it, and no further from the
original."""

import ctypes
from pathlib import Path

import llama_cpp
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrenar.gguf.reader import GGUFFile
from entrenar.gguf.types import FILE_TYPES
from entrenar.recipes.export import export
from tests.support.exporting import export_gguf
from tests.support.gguf_models import MODELS, make_model

pytestmark = pytest.mark.interop


_OTHERS = [name for name in MODELS if name not in ("llama", "mistral")]


@pytest.fixture(scope="module", params=["tied", "untied", "narrow", "shared heads", *_OTHERS])
def original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A random model as an f32 GGUF: 17 layers, so that every eighth and third is met; rows of 256, or of 288."""
    path = tmp_path_factory.mktemp("original") / "f32.gguf"
    if request.param in _OTHERS:
        model = make_model(
            request.param, len(tiny_tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=17,
            num_attention_heads=8, head_dim=32,
        )  # fmt: skip
        export_gguf(model, tiny_tokenizer, path, "f32")
        return path
    hidden, heads = (288, 9) if request.param == "narrow" else (256, 8)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=hidden, intermediate_size=512, num_hidden_layers=17,
        num_attention_heads=heads, num_key_value_heads=heads if request.param == "tied" else 1,
        tie_word_embeddings=request.param != "untied", max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    export_gguf(LlamaForCausalLM(config), tiny_tokenizer, path, "f32")
    return path


def theirs(source: Path, target: Path, number: int) -> GGUFFile:
    """The file that llama.cpp's quantizer makes."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = number
    params.nthread = 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.pointer(params)) == 0
    return GGUFFile(target)


@pytest.mark.parametrize("name", [name for name in FILE_TYPES if name != "f32"])
def test_types_and_errors_are_llama_cpps_or_better(original: Path, tmp_path: Path, name: str) -> None:
    peer = theirs(original, tmp_path / "theirs.gguf", FILE_TYPES[name].number)
    ours = GGUFFile(export(str(original), tmp_path / "ours.gguf", to="gguf", type=name))
    assert {key: info.type.name for key, info in ours.tensors.items()} == {
        key: info.type.name for key, info in peer.tensors.items()
    }
    assert ours.metadata["general.file_type"] == peer.metadata["general.file_type"]
    assert ours.metadata["general.quantization_version"] == peer.metadata["general.quantization_version"]
    source = GGUFFile(original)
    errors = {"ours": 0.0, "theirs": 0.0}
    for key in ours.tensors:
        exact = source.read(key).double()
        errors["ours"] += float((ours.read(key).double() - exact).square().sum())
        errors["theirs"] += float((peer.read(key).double() - exact).square().sum())
    assert errors["ours"] <= errors["theirs"] * 1.0001
