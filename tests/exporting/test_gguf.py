"""A GGUF that is written without loading a model: the same file, blocks taken over as they are, little memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.gguf.reader import GGUFFile
from entrenar.gguf.types import FILE_TYPES
from entrenar.opening.load import load
from entrenar.recipes.export import export
from tests.support.exporting import export_gguf


@pytest.mark.parametrize("type", FILE_TYPES)
def test_streamed_and_live_are_the_same_file(tiny_model_dir: Path, tmp_path: Path, type: str) -> None:
    model, tokenizer = load(str(tiny_model_dir), dtype="float32")
    export_gguf(model, tokenizer, tmp_path / "live.gguf", type)
    live = GGUFFile(tmp_path / "live.gguf")
    streamed = GGUFFile(export(str(tiny_model_dir), tmp_path / "streamed.gguf", to="gguf", type=type))
    assert streamed.tensors.keys() == live.tensors.keys()
    for name in live.tensors:
        assert torch.equal(streamed.blocks(name).read(), live.blocks(name).read()), name
    unnamed = {key: value for key, value in live.metadata.items() if key != "general.name"}
    assert {key: value for key, value in streamed.metadata.items() if key != "general.name"} == unnamed


def test_from_hugging_face_to_gguf_and_back_tensors_are_equal(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = export(str(tiny_model_dir), tmp_path / "m.gguf", to="gguf", type="f32")
    back = export(str(path), tmp_path / "back", type="f32")
    one, other = (AutoModelForCausalLM.from_pretrained(directory) for directory in (tiny_model_dir, back))
    for (name, parameter), (_, again) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(parameter, again), name


def test_blocks_of_the_type_are_taken_over_and_not_quantized_again(
    make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    source = GGUFFile(make_gguf("Q4_1"))
    copy = GGUFFile(export(str(source.path), tmp_path / "copy.gguf", to="gguf", type="q4_1"))
    for name, info in source.tensors.items():
        if name != "token_embd.weight":  # the head, which a mixture holds in more bits
            assert copy.tensors[name].type == info.type
            assert torch.equal(copy.blocks(name).read(), source.blocks(name).read()), name


def test_weights_that_are_not_finite_are_refused_where_blocks_cannot_hold_them(
    make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_gguf(change=lambda arrays: arrays["blk.1.ffn_up.weight"].__setitem__((3, 5), float("nan")))
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds a NaN"):
        export(str(path), tmp_path / "m.gguf", to="gguf", type="q8_0")
    assert not (tmp_path / "m.gguf").exists()


def test_llama_3s_rotary_factors_travel_both_ways(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rope: dict[str, object] = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope, initializer_range=0.1,
        max_position_embeddings=131072,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    export_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    back, _ = load(str(tmp_path / "m.gguf"), dtype="float32")
    assert back.config.rope_parameters == pytest.approx(rope)
    ids = torch.randint(0, 200, (1, 64))
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    again = GGUFFile(export(str(tmp_path / "m.gguf"), tmp_path / "again.gguf", to="gguf", type="f32"))
    assert torch.equal(again.read("rope_freqs.weight"), GGUFFile(tmp_path / "m.gguf").read("rope_freqs.weight"))
