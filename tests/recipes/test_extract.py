"""An adapter out of two full models: exact where the rank suffices, else the best and says by how much it misses."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrenar.core.errors import InputError
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
