"""An export is there when it is whole, measured and verified; until then, or after any error, nothing is."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from entrenar.core.atomic import output_lock
from entrenar.core.errors import EntrenarError, InputError
from entrenar.evaluation.fidelity import fidelity
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.recipes import export as recipe
from entrenar.recipes import export_safetensors
from entrenar.recipes.export import export


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    model, _ = load(str(tiny_model_dir), dtype="float32")
    attach_lora(model, rank=2)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_b, std=0.1)
    directory = tmp_path_factory.mktemp("lora") / "adapter"
    save_adapter(model, directory)
    return str(directory)


def changed(model: Path, folder: Path, value: float) -> Path:
    """A copy of the model with one weight of one matrix set."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_what_float16_cannot_hold_is_refused_by_name(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    large = changed(tiny_model_dir, tmp_path / "large", 1e5)
    tensor = r"(model\.layers\.1\.mlp\.up_proj|blk\.1\.ffn_up)\.weight"
    with pytest.raises(InputError, match=rf"{tensor} holds 100000, and the largest number of float16 is 65504"):
        export(str(large), tmp_path / name, type="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    export(str(large), tmp_path / name, type="bf16")
    export(str(changed(tiny_model_dir, tmp_path / "most", 65504.0)), tmp_path / f"most-{name}", type="f16")


@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_refused_in_every_type(
    tiny_model_dir: Path, tmp_path: Path, type: str, value: float
) -> None:
    broken = str(changed(tiny_model_dir, tmp_path / "broken", value))
    for name in ("out", "out.gguf"):
        with pytest.raises(InputError, match=r"up.*weight holds a NaN or an infinity"):
            export(broken, tmp_path / name, type=type)
        assert not (tmp_path / name).exists()


def test_a_directory_has_its_name_once_it_is_measured(
    tiny_model_dir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> float:
        assert not (tmp_path / "out").exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_safetensors, "kl_divergence", fails)
    with pytest.raises(EntrenarError, match="no space left"):
        export(str(tiny_model_dir), tmp_path / "out", text=str(tiny_data))
    assert not list(tmp_path.iterdir())


def test_a_gguf_has_its_name_once_it_is_verified(
    tiny_model_dir: Path, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def fails(_live: Any, _tokenizer: Any, written: Path, _text: Any) -> None:
        seen.append(written)
        assert load(str(written))[0].num_parameters()
        raise EntrenarError("it is not the same")

    monkeypatch.setattr(recipe, "verify", fails)
    with pytest.raises(EntrenarError, match="not the same"):
        export(str(tiny_model_dir), tmp_path / "m.gguf", adapter=adapter, on_verified=lambda _: None)
    assert seen[0].parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_a_text_that_does_not_serve_is_told_before_any_work(
    tiny_model_dir: Path, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("")
    monkeypatch.setattr(recipe, "write_gguf", lambda *_: pytest.fail("the model was written first"))
    with pytest.raises(InputError, match=r"short\.txt has 0 tokens: name a longer text to verify on"):
        export(
            str(tiny_model_dir), tmp_path / "m.gguf", adapter=adapter, on_verified=lambda _: None,
            verify_on=tmp_path / "short.txt",
        )  # fmt: skip


def test_two_exports_to_one_output_are_not_at_work_at_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("out", "out.gguf"):
        with output_lock(tmp_path / name), pytest.raises(InputError, match="another process is writing"):
            export(str(tiny_model_dir), tmp_path / name)
        export(str(tiny_model_dir), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.gguf"]


@pytest.mark.parametrize("name", ["/proc/x", "/proc/x.gguf", "/dev/null/x", "file/x.gguf", "a\0b", "n" * 300])
def test_a_place_that_takes_no_files_is_one_sentence(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        export(str(tiny_model_dir), tmp_path / name)


def test_a_modelfile_left_by_a_killed_export_is_no_hindrance(
    tiny_model_dir: Path, adapter: str, tmp_path: Path
) -> None:
    (tmp_path / "Modelfile").write_text("FROM somewhere\nADAPTER ./a.gguf\n")
    said: list[str] = []
    export(str(tiny_model_dir), tmp_path / "a.gguf", adapter=adapter, to="gguf-adapter", ollama=True, say=said.append)
    assert said == [f"wrote {tmp_path / 'Modelfile'}: ollama create a -f {tmp_path / 'Modelfile'}"]
    assert str(tiny_model_dir) in (tmp_path / "Modelfile").read_text()
    with pytest.raises(InputError, match="Modelfile already exists and is of another adapter"):
        export(str(tiny_model_dir), tmp_path / "b.gguf", adapter=adapter, to="gguf-adapter", ollama=True)


def test_an_adapter_that_cannot_be_written_leaves_no_modelfile(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        export(
            str(tiny_model_dir), tmp_path / "a.gguf", adapter=str(tmp_path / "empty"), to="gguf-adapter", ollama=True
        )
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_loss_beyond_every_float_is_infinite_and_no_error() -> None:
    sure = torch.tensor([[0.0, -1e4]])
    assert fidelity("x", sure, sure, torch.tensor([0, 1])).perplexity == float("inf")


def test_four_bits_are_refused_by_the_share_that_is_lost_and_not_by_their_base(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A change of many times a block's steps survives on a dequantized base as well, so it is written there."""
    model, _ = load(str(tiny_model_dir), "nf4", dtype="float32")
    attach_lora(model, rank=8, alpha=64)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_b, std=0.5)
    save_adapter(model, tmp_path / "adapter")
    path = export(
        str(tiny_model_dir), tmp_path / "out", adapter=str(tmp_path / "adapter"), type="nf4", base="dequantized"
    )
    assert json.loads((path / "fidelity.json").read_text())["survival"] > 0.75
