"""Calibrating: importance is what it is defined as, and quantizing by it loses less of what the model computes."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.evaluation.fidelity import ExportStep
from entrenar.evaluation.importance import column_importance
from entrenar.gguf.reader import GGUFFile
from entrenar.lora.attach import attach_lora
from entrenar.opening.load import load
from entrenar.recipes.export import export

TEXT = "Please switch on the lamp in the kitchen. " * 60


@pytest.fixture
def uneven(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A model whose columns are excited unevenly: a few channels of the hidden state are large, as in real ones."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.08, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[::9] *= 12
    model.save_pretrained(tmp_path / "uneven")
    tiny_tokenizer.save_pretrained(tmp_path / "uneven")
    return tmp_path / "uneven"


def _text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_importance_is_the_mean_square_of_what_enters(uneven: Path) -> None:
    model, _ = load(str(uneven), "none", dtype="float32")
    rows = [torch.arange(40), torch.arange(5, 12)]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    found = column_importance(model, rows)
    layer = model.model.layers[0]
    entering = layer.input_layernorm(model.model.embed_tokens(torch.cat(rows)))
    expected = entering.detach().double().square().mean(dim=0)
    wanted = (expected / expected.mean()).float()
    for part in ("q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(found[f"model.layers.0.self_attn.{part}.weight"], wanted)
    assert found.keys() == {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_adapted_layer_counts_by_its_own_name(uneven: Path, quantize: str) -> None:
    """The adapter's input is the base's; without a change (B = 0) importance is the same."""
    model, _ = load(str(uneven), quantize, dtype="float32")
    rows = [torch.arange(40)]
    plain = column_importance(model, rows)
    attach_lora(model, rank=2)
    adapted = column_importance(model.eval(), rows)
    assert plain.keys() <= adapted.keys()
    torch.testing.assert_close({name: adapted[name] for name in plain}, plain)


def test_a_column_that_is_never_excited_still_counts(uneven: Path) -> None:
    model: PreTrainedModel = load(str(uneven), "none", dtype="float32")[0]
    model.model.layers[0].input_layernorm.weight.data[:100] = 0
    found = column_importance(model, [torch.arange(40)])["model.layers.0.self_attn.q_proj.weight"]
    assert (found[:100] > 0).all()
    model.model.layers[0].input_layernorm.weight.data[:] = 0
    assert (column_importance(model, [torch.arange(40)])["model.layers.0.self_attn.q_proj.weight"] == 1).all()


@pytest.mark.parametrize("type", ["q4_k_m", "q5_k_s", "q6_k"])
def test_calibrated_is_nearer_to_the_live_model(uneven: Path, tmp_path: Path, type: str) -> None:
    text, kl = _text(tmp_path), {}
    for name, calibrate_on in (("plain", None), ("calibrated", text)):
        steps: list[ExportStep] = []
        export(
            str(uneven), tmp_path / f"{name}.gguf", to="gguf", type=type, on_verified=steps.extend,
            calibrate_on=calibrate_on,
        )  # fmt: skip
        kl[name] = steps[-1].kl
    assert kl["calibrated"] < 0.9 * kl["plain"]
    keys = GGUFFile(tmp_path / "calibrated.gguf").metadata
    assert keys["quantize.imatrix.dataset"] == "text.txt"
    assert keys["quantize.imatrix.entries_count"] == 15
    assert "quantize.imatrix.dataset" not in GGUFFile(tmp_path / "plain.gguf").metadata


def test_the_error_that_counts_is_smaller_in_every_matrix(uneven: Path, tmp_path: Path) -> None:
    model, tokenizer = load(str(uneven), "none", dtype="float32")
    ids: list[int] = tokenizer(TEXT)["input_ids"]  # pyright: ignore
    importance = column_importance(model, torch.tensor(ids).split(512))
    files = {}
    for name, calibrate_on in (("plain", None), ("calibrated", _text(tmp_path))):
        path = export(str(uneven), tmp_path / f"{name}.gguf", to="gguf", type="q4_k_s", calibrate_on=calibrate_on)
        files[name] = load(str(path), "none", dtype="float32")[0].state_dict()
    for weight, columns in importance.items():
        plain, calibrated = (
            ((files[name][weight] - model.state_dict()[weight]).square() * columns).sum() for name in files
        )
        assert calibrated < plain, weight


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"to": "gguf", "type": "q8_0"}, "nothing in q8_0 is calibrated: only mixtures of q4_k, q5_k, q6_k are"),
        ({"to": "safetensors"}, "calibrated and verified is a GGUF's model, not safetensors"),
        ({"to": "gguf", "type": "q4_k_m", "calibrate_on": "nowhere.txt"}, "cannot read the text nowhere.txt to calib"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    uneven: Path, tmp_path: Path, arguments: dict[str, str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        export(str(uneven), tmp_path / "out", **({"calibrate_on": str(_text(tmp_path))} | arguments))  # pyright: ignore
    assert not (tmp_path / "out").exists()
