"""An adapter out of two full models: exact where the rank suffices, else the best and says by how much it misses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from entrenar.core.errors import InputError
from entrenar.exporting.streaming import StreamedModel
from entrenar.files.peft import read_adapter
from entrenar.lora.adapter_io import load_adapter
from entrenar.opening.source import open_source
from entrenar.recipes.export import export
from entrenar.recipes.extract import extract_adapter


@pytest.fixture
def tuned(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model after changes of rank 3 in its projections, and one to a norm."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data += 0.02 * torch.randn(len(weight), 3) @ torch.randn(3, weight.shape[1])
    model.model.norm.weight.data += 0.1
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_a_rank_that_suffices_gives_the_tuned_weights(tiny_model_dir: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract_adapter(str(tiny_model_dir), str(tuned), tmp_path / "adapter", rank=3)
    assert found.error < 1e-3
    assert found.left_out == ["model.norm.weight"]
    path = export(str(tiny_model_dir), tmp_path / "fused", adapter=found.adapter, type="f32")
    ours, theirs = (dict(AutoModelForCausalLM.from_pretrained(p).named_parameters()) for p in (path, tuned))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours if "_proj" in name)


def test_a_smaller_rank_misses_what_the_singular_values_say(tiny_model_dir: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract_adapter(str(tiny_model_dir), str(tuned), tmp_path / "adapter", rank=1, targets=["up_proj"])
    models = [dict(AutoModelForCausalLM.from_pretrained(p).named_parameters()) for p in (tuned, tiny_model_dir)]
    for layer, error in found.errors.items():
        values = torch.linalg.svdvals(models[0][f"{layer}.weight"] - models[1][f"{layer}.weight"])
        assert error == pytest.approx((values[1:].norm() / values.norm()).item(), rel=1e-3)
    assert len(found.errors) == 2


def test_a_model_without_a_difference_has_nothing_to_extract(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to extract"):
        extract_adapter(str(tiny_model_dir), str(tiny_model_dir), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_layers_that_keep_their_weight_the_other_way_round_are_extracted_so(tmp_path: Path) -> None:
    """GPT-2's Conv1D has (d_in, d_out), square ones among them: the adapter gives the tuned model's logits."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=64)).eval()
    model.save_pretrained(tmp_path / "base")
    for name, weight in model.named_parameters():
        if "attn.c_" in name and weight.dim() == 2:
            weight.data += 0.1 * torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
    model.save_pretrained(tmp_path / "tuned")
    found = extract_adapter(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "adapter", rank=2)
    assert found.left_out == []
    adapted = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    load_adapter(adapted, found.adapter)
    ids = torch.arange(2, 20)[None]
    torch.testing.assert_close(adapted(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-4)
    assert read_adapter(tmp_path / "adapter").fan_in_fan_out


def test_of_a_quantized_model_the_weights_are_meant_and_not_their_codes(
    tiny_model_dir: Path, tuned: Path, tmp_path: Path
) -> None:
    packed = export(str(tuned), tmp_path / "packed", type="nf4", lossy=True)
    found = extract_adapter(str(tiny_model_dir), str(packed), tmp_path / "adapter", rank=64, targets=["q_proj"])
    held, base = (StreamedModel(open_source(str(path)), None, None) for path in (packed, tiny_model_dir))
    for layer, (a, b) in read_adapter(Path(found.adapter)).factors.items():
        expected = held.fused(f"{layer}.weight").weight.float() - base.fused(f"{layer}.weight").weight.float()
        torch.testing.assert_close(b @ a, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"targets": ["embed_tokens"]}, "embed_tokens cannot be extracted"), ({"rank": 65}, "rank 65 .*choose 1 to 64"),
])  # fmt: skip
def test_what_is_not_extracted_is_said(
    tiny_model_dir: Path, tuned: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        extract_adapter(str(tiny_model_dir), str(tuned), tmp_path / "adapter", **options)
    assert not (tmp_path / "adapter").exists()
