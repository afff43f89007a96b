"""New tokens from config to export: added, trained, saved with the adapter, fused into rows of the result."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrenar.core.errors import InputError
from entrenar.opening.adapted import open_model
from entrenar.opening.load import load
from entrenar.recipes.check import check
from entrenar.recipes.evaluate import evaluate
from entrenar.recipes.export import export
from entrenar.recipes.train import train

MakeConfig = Callable[..., Path]
NEW = ["<tool>", "<done>"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"switch on the lamp {n}", "completion": "<tool> lamp <done>"} for n in range(24)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "new.jsonl"


def changed(data: Path) -> dict[str, object]:
    return {
        "lora.new_tokens": NEW, "lora.dropout": 0.0, "data.train": str(data), "data.validation_fraction": 0.0,
        "eval.every_steps": None,
    }  # fmt: skip


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_run_with_new_tokens(
    make_config: MakeConfig, tiny_model_dir: Path, data: Path, tmp_path: Path, quantize: str
) -> None:
    config = make_config(**changed(data), **{"model.quantize": quantize})
    assert check(config).trainable_parameters > 2 * 64
    result = train(config)
    adapter = Path(result.adapter)
    old = len(AutoTokenizer.from_pretrained(tiny_model_dir))
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.convert_tokens_to_ids(NEW) == [old, old + 1]
    assert json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "embed_tokens": [old, old + 1]
    }
    rows = load_file(adapter / "adapter_model.safetensors")[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    embedding = load_file(tiny_model_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.shape == (2, 64)
    assert (rows - embedding.mean(0)).abs().max() > 1e-2

    live, own = open_model(str(tiny_model_dir), str(adapter), dtype="float32")
    assert len(own) == old + 2
    ids = torch.tensor([own("please <tool> the lamp <done>")["input_ids"]])
    assert {old, old + 1} <= set(ids[0].tolist())
    export(str(tiny_model_dir), tmp_path / "fused", adapter=str(adapter), type="f32")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    assert fused.config.vocab_size == old + 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "fused")) == old + 2
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, live(ids).logits, rtol=1e-3, atol=1e-3)
    export(str(tiny_model_dir), tmp_path / "fused.gguf", adapter=str(adapter), to="gguf", type="f32")
    again, theirs = load(str(tmp_path / "fused.gguf"), "none", dtype="float32")
    assert theirs("please <tool> the lamp <done>")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, live(ids).logits, rtol=1e-3, atol=1e-3)
    assert evaluate(str(tiny_model_dir), data, adapter=str(adapter), match=False).loss < 5  # of 6 before training


def test_a_stopped_run_goes_on_with_its_rows(make_config: MakeConfig, data: Path) -> None:
    changes = {
        "lora.new_tokens": NEW,
        "data.train": str(data),
        "data.validation_fraction": 0.0,
        "eval.every_steps": None,
    }
    straight = train(make_config("straight", **changes))
    config = make_config("stopped", **changes)
    seen: list[int] = []

    def stop(_: object) -> None:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stop)
    resumed = train(config)
    assert resumed.resumed_from_step > 0
    one, other = (load_file(Path(each.adapter) / "adapter_model.safetensors") for each in (straight, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_whose_tokenizer_is_lost_is_refused(
    make_config: MakeConfig, tiny_model_dir: Path, data: Path
) -> None:
    changes = {
        "lora.new_tokens": NEW,
        "data.train": str(data),
        "data.validation_fraction": 0.0,
        "eval.every_steps": None,
    }
    adapter = Path(train(make_config(**changes)).adapter)
    (adapter / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no tokenizer lies beside the adapter"):
        open_model(str(tiny_model_dir), str(adapter))


def test_a_gguf_in_its_own_blocks_gets_no_rows(
    make_config: MakeConfig, tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    base = str(tmp_path / "base.gguf")
    export(str(tiny_model_dir), base, to="gguf", type="q8_0")
    changes = {**changed(data), "model.path": base, "model.quantize": "keep"}
    with pytest.raises(InputError, match="is held in its file's own blocks, to which no rows are added"):
        train(make_config(**changes))
    train(make_config(**changes | {"lora.new_tokens": []}))
