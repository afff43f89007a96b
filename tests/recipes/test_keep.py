"""The whole job on a GGUF's own blocks: check, train, evaluate, inspect."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from entrenar.core.config import load_config
from entrenar.core.errors import InputError
from entrenar.files.peft import read_base_format
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import attach_lora
from entrenar.opening import compute
from entrenar.opening.adapted import open_model
from entrenar.opening.load import load
from entrenar.recipes.config import RunConfig
from entrenar.recipes.evaluate import evaluate
from entrenar.recipes.export import export
from entrenar.recipes.inspect import inspect
from entrenar.recipes.train import train

MakeConfig = Callable[..., Path]


@pytest.fixture
def base(tiny_model_dir: Path, tmp_path: Path) -> str:
    return str(export(str(tiny_model_dir), tmp_path / "base.gguf", to="gguf", type="q4_1"))


def test_a_gguf_is_kept_unless_the_config_says_otherwise(make_config: MakeConfig, base: str) -> None:
    path = make_config(**{"model.path": base})
    assert load_config(RunConfig, path).model.quantize == "keep"
    assert load_config(RunConfig, path, {"model.quantize": "nf4"}).model.quantize == "nf4"
    assert load_config(RunConfig, make_config()).model.quantize == "nf4"
    with pytest.raises(InputError, match=r"holds a \.gguf file's own blocks"):
        load_config(RunConfig, make_config(), {"model.quantize": "keep"})


@pytest.mark.parametrize(
    "variant",
    [{}, {"lora.dora": True}, {"lora.modules_to_save": ["norm"]}],
    ids=["plain", "DoRA", "saved modules"],
)
def test_a_run_trains_on_the_blocks_and_its_adapter_remembers_them(
    make_config: MakeConfig, base: str, tiny_data: Path, variant: dict[str, object]
) -> None:
    result = train(make_config(**{"model.path": base}, **variant))
    noted = read_base_format(Path(result.adapter))
    assert noted is not None
    assert noted.format == "keep"
    before = evaluate(base, tiny_data, match=False)
    after = evaluate(base, tiny_data, adapter=result.adapter, match=False)
    assert after.loss < before.loss - 0.05


def test_another_base_than_the_adapters_is_told_once(
    base: str, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = {base: tmp_path / "kept", str(tiny_model_dir): tmp_path / "plain"}
    for name, adapter in adapters.items():
        model, _ = load(name)
        attach_lora(model, rank=2)
        save_adapter(model, adapter)
    for _ in range(2):
        open_model(base, str(adapters[base]), "nf4")
    told = [record.getMessage() for record in caplog.records if "trained over a base" in record.getMessage()]
    assert len(told) == 1
    assert f"the adapter was trained over a base held as keep, and {base} is held as nf4 here" in told[0]
    caplog.clear()
    for quantize in (None, "keep"):
        open_model(base, str(adapters[base]), quantize)
    open_model(str(tiny_model_dir), str(adapters[str(tiny_model_dir)]), "nf4")  # over no format that it could note
    assert "trained over a base" not in caplog.text


def test_inspect_tells_bits_per_weight_by_place(base: str, tiny_model_dir: Path) -> None:
    bits = inspect(base).bits_per_weight()
    assert {place: bits[place] for place in ("attention", "MLP", "norms", "embedding")} == {
        "attention": 5.0, "MLP": 5.0, "norms": 32.0, "embedding": 8.5,
    }  # fmt: skip
    assert 5.0 < bits["all"] < 8.5
    assert inspect(tiny_model_dir).bits_per_weight() == {}


def test_an_embedding_in_blocks_is_not_adapted_and_the_user_hears_why(base: str) -> None:
    model, _ = load(base)
    with pytest.raises(InputError, match=r"embed_tokens is held in its file's own blocks.*quantize: nf4"):
        attach_lora(model, targets=["q_proj", "embed_tokens"])


@pytest.mark.parametrize("native", ["float32", "bfloat16"])
def test_the_dtype_that_a_run_notes_is_the_one_it_computes_in(
    make_config: MakeConfig, base: str, monkeypatch: pytest.MonkeyPatch, native: str
) -> None:
    monkeypatch.setattr(compute, "native_dtype", lambda _: getattr(torch, native))
    said: list[str] = []
    result = train(make_config(**{"model.path": base, "model.dtype": "auto"}), say=said.append)
    assert load_config(RunConfig, Path(result.run_dir) / "config.yaml").model.dtype == native
    assert any(sentence.startswith("computing in float32") for sentence in said) == (native == "float32")
