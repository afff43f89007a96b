"""What is exported is the model that was trained: transformers reads the directory, we read the GGUF."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.gguf.reader import GGUFFile
from entrenar.opening.adapted import open_model
from entrenar.opening.load import load
from entrenar.recipes.export import export
from entrenar.recipes.train import train
from tests.support.exporting import export_huggingface

MakeConfig = Callable[..., Path]
IDS = torch.tensor([[1, 40, 80, 120, 7, 9, 200]])


@pytest.fixture
def adapter(make_config: MakeConfig) -> str:
    """An adapter of six steps over the tiny model on nf4."""
    return train(make_config()).adapter


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def test_transformers_loads_the_fused_directory_with_the_live_models_logits(
    tiny_model_dir: Path, adapter: str, tmp_path: Path
) -> None:
    live, tokenizer = open_model(str(tiny_model_dir), adapter, dtype="float32")
    path = export(tiny_model_dir, tmp_path / "out", adapter=Path(adapter), type="f32")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(live), atol=1e-5, rtol=1e-5)
    plain, _ = load(tiny_model_dir, dtype="float32")
    assert not torch.allclose(logits(plain), logits(live), atol=1e-3)
    again = AutoTokenizer.from_pretrained(path)
    text = "Please switch on the lamp 123.\n"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(("type", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_directory_says_its_type_and_nothing_of_quantization(
    tiny_model_dir: Path, adapter: str, tmp_path: Path, type: str, dtype: torch.dtype
) -> None:
    path = export(str(tiny_model_dir), tmp_path / "out", adapter=adapter, type=type)
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_shards_load_as_the_whole(tiny_model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load(str(tiny_model_dir), "nf4", dtype="float32")
    export_huggingface(model, tokenizer, tmp_path / "shards", torch.float32, max_shard_bytes=50_000)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 3
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("type", "bound"), [("f32", 1e-5), ("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 3e-2)])
def test_a_gguf_reads_back_as_the_live_model(
    tiny_model_dir: Path, adapter: str, tmp_path: Path, type: str, bound: float
) -> None:
    live, tokenizer = open_model(str(tiny_model_dir), adapter, dtype="float32")
    path = export(str(tiny_model_dir), tmp_path / "m.gguf", adapter=adapter, to="gguf", type=type)
    back, words = load(str(path), dtype="float32")
    assert (logits(back) - logits(live)).norm() / logits(live).norm() < bound
    text = "Please switch on 12 lamps…"
    assert words(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert words.chat_template == tokenizer.chat_template
    types = {info.type.name for info in GGUFFile(path).tensors.values() if len(info.shape) > 1}
    assert types == {type.upper()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"to": "onnx"}, "cannot export to 'onnx': choose safetensors or gguf"),
        ({"to": "gguf", "type": "q9_k"}, "gguf has no type 'q9_k' here: choose f16"),
        ({"adapter": "nowhere"}, "nowhere.* does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    tiny_model_dir: Path, tmp_path: Path, arguments: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        export(str(tiny_model_dir), tmp_path / "out", **arguments)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_a_taken_output_is_refused_and_untouched(tiny_model_dir: Path, tmp_path: Path) -> None:
    taken = tmp_path / "m.gguf"
    taken.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        export(str(tiny_model_dir), taken, to="gguf")
    assert taken.read_text() == "mine"
