"""A GGUF adapter: what llama.cpp computes of it is what the live model computes; what it cannot carry is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from entrenar.core.errors import InputError
from entrenar.exporting.gguf_adapter import export_gguf_adapter
from entrenar.files.gguf import GGUFFile
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.models.llama_gguf import gguf_name, to_gguf
from entrenar.models.load import load
from entrenar.models.source import open_source
from entrenar.recipes.export import export


def _trained(model_dir: Path, directory: Path, **changes: object) -> nn.Module:
    """The tiny model with an adapter of random factors, saved in `directory`."""
    model, _ = load(str(model_dir), dtype="float32")
    attach_lora(model, **{"rank": 4, "alpha": 6.0, **changes})  # pyright: ignore[reportArgumentType]
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_b)
    save_adapter(model, directory)
    return model


def _deltas(path: Path) -> dict[str, np.ndarray]:
    """Tensor → what llama.cpp adds to it: alpha / rank · B·A, rank the rows of each A."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    field = reader.get_field("adapter.lora.alpha")
    assert field is not None
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
    return {
        name: field.contents() / len(tensors[f"{name}.lora_a"]) * tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        for name in names
    }


@pytest.mark.parametrize("scale", [None, 0.3])
def test_what_the_runtime_adds_is_the_live_delta(tiny_model_dir: Path, tmp_path: Path, scale: float | None) -> None:
    """Also where one layer's scale is another (per-module alphas, rsLoRA)."""
    model = _trained(tiny_model_dir, tmp_path / "adapter")
    path = export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))
    if scale is not None:  # this version's PEFT reader has one scale: changed on the way
        path = _with_scale(tiny_model_dir, tmp_path, scale)
    found, config = _deltas(path), open_source(str(tiny_model_dir)).config
    layers = dict(adapted_layers(model))
    assert found.keys() == {gguf_name(f"{name}.weight") for name in layers}
    for number, (name, layer) in enumerate(layers.items()):
        expected = (layer.merge_to_f32() - layer.get_parameter("base_weight")).detach()
        if scale is not None and number == 3:
            expected = expected * (scale / layer.scale)
        wanted = to_gguf(f"{name}.weight", expected, config)
        np.testing.assert_allclose(found[str(gguf_name(f"{name}.weight"))], wanted, atol=1e-5)


def _with_scale(model_dir: Path, tmp_path: Path, scale: float) -> Path:
    from entrenar.exporting import gguf_adapter as module

    def load_with_scale(model: nn.Module, directory: str) -> None:
        load_adapter(model, directory)
        list(adapted_layers(model))[3][1].scale = scale

    load_adapter = module.load_adapter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_adapter", load_with_scale)
        export_gguf_adapter(open_source(str(model_dir)), str(tmp_path / "adapter"), tmp_path / "scaled.gguf")
    return tmp_path / "scaled.gguf"


def test_the_file_says_what_it_is(tiny_model_dir: Path, tmp_path: Path) -> None:
    _trained(tiny_model_dir, tmp_path / "adapter", targets=["q_proj"])
    path = export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))
    file = GGUFFile(path)
    said = {key: file.metadata[key] for key in ("general.type", "general.architecture", "adapter.type")}
    assert said == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    assert file.metadata["adapter.lora.alpha"] == 6.0
    assert file.tensors["blk.1.attn_q.weight.lora_a"].shape == (4, 64)
    assert file.tensors["blk.1.attn_q.weight.lora_b"].shape == (64, 4)
    assert not (tmp_path / "Modelfile").exists()


def test_an_ollama_modelfile_on_request(tiny_model_dir: Path, tmp_path: Path) -> None:
    _trained(tiny_model_dir, tmp_path / "adapter")
    arguments = {"to": "gguf-adapter", "adapter": str(tmp_path / "adapter")}
    export(str(tiny_model_dir), tmp_path / "a.gguf", ollama=True, **arguments)  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "Modelfile").read_text() == f"FROM {tiny_model_dir.resolve()}\nADAPTER ./a.gguf\n"
    with pytest.raises(InputError, match="Modelfile already exists"):
        export(str(tiny_model_dir), tmp_path / "b.gguf", ollama=True, **arguments)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "b.gguf").exists()


def test_what_it_cannot_carry_is_refused_with_the_way_out(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _trained(tiny_model_dir, tmp_path / "head", targets=["lm_head"])
    with pytest.raises(InputError, match=r"lm_head is tied .*--to gguf"):
        export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "head"))
    _trained(tiny_model_dir, tmp_path / "adapter")
    from entrenar.exporting import gguf_adapter as module

    original = module.load_adapter

    def with_a_saved_norm(model: nn.Module, directory: str) -> None:
        original(model, directory)
        model.get_parameter("model.norm.weight").requires_grad_(True)

    monkeypatch.setattr(module, "load_adapter", with_a_saved_norm)
    with pytest.raises(InputError, match=r"beside A and B.*model\.norm\.weight; fuse"):
        export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))
    assert not (tmp_path / "a.gguf").exists()


def test_it_needs_an_adapter_and_is_the_only_one_with_a_modelfile(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is given"):
        export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf-adapter")
    with pytest.raises(InputError, match="choose --to gguf-adapter"):
        export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf", ollama=True)


def test_another_models_adapter_is_refused(tiny_model_dir: Path, tmp_path: Path, smollm2: Path) -> None:
    _trained(tiny_model_dir, tmp_path / "adapter")
    with pytest.raises(InputError, match="shapes"):
        export(str(smollm2), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))


def test_nothing_of_the_base_is_read(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trained(tiny_model_dir, tmp_path / "adapter")
    source = open_source(str(tiny_model_dir))
    monkeypatch.setattr(source.weights, "stored", lambda name: pytest.fail("a weight was read"))
    export_gguf_adapter(source, str(tmp_path / "adapter"), tmp_path / "a.gguf")
    assert torch.isfinite(GGUFFile(tmp_path / "a.gguf").read("blk.0.ffn_up.weight.lora_b")).all()
