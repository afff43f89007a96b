"""Every family to GGUF and back: the same tensors, logits, config, tokens and chat template."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.gguf.families import FAMILIES
from entrenar.gguf.reader import GGUFFile
from entrenar.gguf.rope import rope_tensors, set_rope_tensors
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.opening.source import open_source
from entrenar.recipes.export import export
from tests.support.exporting import export_gguf
from tests.support.gguf_models import LONGROPE, MODELS, PHI3_LONG, make_model


def logits(model: PreTrainedModel, rows: int, length: int = 24) -> Tensor:
    ids = torch.randint(3, rows, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_every_family_is_tried_here() -> None:
    assert {model_type for row in FAMILIES.values() for model_type in row.model_types} == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_it_is_the_same_model(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = len(tiny_tokenizer)
    model = make_model(name, rows)
    export_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    back, tokenizer = load(str(tmp_path / "m.gguf"), dtype="float32")
    again = dict(back.named_parameters())
    assert again.keys() == dict(model.named_parameters()).keys()
    for parameter, tensor in model.named_parameters():
        assert torch.equal(again[parameter], tensor), parameter
    torch.testing.assert_close(logits(back, rows), logits(model, rows), rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    text = "Switch on 12 lamps — naïve <|im_end|>\n\n 東京"
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", MODELS)
def test_its_blocks_are_trained_on_and_the_adapter_has_its_places(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Kept as q8_0: a gradient reaches every adapter, and every one of them has a tensor of the model to go to."""
    base = tmp_path / "m.gguf"
    export_gguf(make_model(name, len(tiny_tokenizer)), tiny_tokenizer, base, "q8_0")
    model, _ = load(str(base), dtype="float32")
    attach_lora(model, rank=2, alpha=4.0)
    layers = dict(adapted_layers(model))
    model(input_ids=torch.arange(3, 20)[None]).logits.square().sum().backward()
    for layer in layers.values():
        assert layer.lora_b.grad is not None
        assert layer.lora_b.grad.abs().max() > 0
        torch.nn.init.normal_(layer.lora_b)
    save_adapter(model, tmp_path / "adapter")
    path = export(str(base), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))
    adapter, weights = GGUFFile(path), GGUFFile(base)
    assert adapter.metadata["general.architecture"] == weights.metadata["general.architecture"]
    assert len(adapter.tensors) == 2 * len(layers)
    for tensor, info in adapter.tensors.items():
        owner, _, factor = tensor.rpartition(".")
        assert info.shape[factor == "lora_a"] == weights.tensors[owner].shape[factor == "lora_a"]


def test_phi_s_long_and_short_factors_travel_both_ways(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Within the original context and beyond it, and from GGUF to GGUF."""
    rows = len(tiny_tokenizer)
    model = make_model("phi3", rows, **PHI3_LONG)
    export_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "f32")
    back, _ = load(str(tmp_path / "m.gguf"), dtype="float32")
    assert back.config.rope_parameters == LONGROPE
    for length in (24, 300):
        torch.testing.assert_close(logits(back, rows, length), logits(model, rows, length), rtol=1e-4, atol=1e-4)
    again = GGUFFile(export(str(tmp_path / "m.gguf"), tmp_path / "again.gguf", to="gguf", type="f32"))
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        assert torch.equal(again.read(name), GGUFFile(tmp_path / "m.gguf").read(name))


def test_an_attention_factor_of_its_own_travels_too(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    changes = PHI3_LONG | {"rope_parameters": LONGROPE | {"attention_factor": 1.5}}
    export_gguf(make_model("phi3", len(tiny_tokenizer), **changes), tiny_tokenizer, tmp_path / "m.gguf", "f32")
    assert open_source(str(tmp_path / "m.gguf")).config.to_dict()["rope_parameters"]["attention_factor"] == 1.5


@pytest.mark.parametrize("change", [lambda long: long[:-1], lambda long: None], ids=["too few", "missing"])
def test_factors_that_do_not_fit_are_an_error(
    change: Callable[[Tensor], Tensor | None], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = make_model("phi3", len(tiny_tokenizer), **PHI3_LONG).config
    tensors = rope_tensors(config)
    found = change(tensors.pop("rope_factors_long.weight"))
    tensors |= {} if found is None else {"rope_factors_long.weight": found}
    with pytest.raises(InputError, match=r"x\.gguf has no rope_factors_long\.weight of 4 rotary factors"):
        set_rope_tensors(config, tensors, None, "x.gguf")


def test_a_head_of_its_own_is_refused_where_llama_cpp_has_none(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = make_model("gemma2", len(tiny_tokenizer), tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"no place for lm_head\.weight in the gemma2 architecture"):
        export_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "f16")
