"""A GGUF that is written without loading a model: the same file, blocks taken over as they are, little memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from entrenar.core.errors import InputError
from entrenar.exporting.gguf import export_gguf
from entrenar.exporting.gguf_types import FILE_TYPES
from entrenar.files.gguf import GGUFFile
from entrenar.models.load import load
from entrenar.recipes.export import export


@pytest.mark.parametrize("type", FILE_TYPES)
def test_streamed_and_live_are_the_same_file(tiny_model_dir: Path, tmp_path: Path, type: str) -> None:
    model, tokenizer = load(str(tiny_model_dir), dtype="float32")
    export_gguf(model, tokenizer, tmp_path / "live.gguf", type)
    live = GGUFFile(tmp_path / "live.gguf")
    streamed = GGUFFile(export(str(tiny_model_dir), tmp_path / "streamed.gguf", to="gguf", type=type))
    assert streamed.tensors.keys() == live.tensors.keys()
    for name in live.tensors:
        assert torch.equal(streamed.packed(name).read(), live.packed(name).read()), name
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
            assert torch.equal(copy.packed(name).read(), source.packed(name).read()), name


def test_weights_that_are_not_finite_are_refused_where_blocks_cannot_hold_them(
    make_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_gguf(change=lambda arrays: arrays["blk.1.ffn_up.weight"].__setitem__((3, 5), float("nan")))
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds a NaN"):
        export(str(path), tmp_path / "m.gguf", to="gguf", type="q8_0")
    assert not (tmp_path / "m.gguf").exists()
