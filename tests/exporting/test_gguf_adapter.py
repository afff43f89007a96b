"""A GGUF adapter: what llama.cpp computes of it is what the live model computes; what it cannot carry is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

from entrenar.core.errors import InputError
from entrenar.exporting.gguf_adapter import export_gguf_adapter
from entrenar.gguf.families import FAMILIES
from entrenar.gguf.reader import GGUFFile
from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.opening.source import open_source
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


@pytest.mark.parametrize(
    "changes",
    [{}, {"rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 1.5}}],
    ids=["plain", "rslora", "patterns"],
)
def test_what_the_runtime_adds_is_the_live_delta(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    """Also where one layer's scale is another."""
    model = _trained(tiny_model_dir, tmp_path / "adapter", **changes)
    path = export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))
    found, config = _deltas(path), open_source(str(tiny_model_dir)).config
    layers = dict(adapted_layers(model))
    assert found.keys() == {FAMILIES["llama"].gguf_name(f"{name}.weight") for name in layers}
    for name, layer in layers.items():
        expected = (layer.merge_to_f32() - layer.base_to_f32()).detach()
        wanted = FAMILIES["llama"].to_gguf(f"{name}.weight", expected, config)
        np.testing.assert_allclose(found[str(FAMILIES["llama"].gguf_name(f"{name}.weight"))], wanted, atol=1e-5)


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
    assert (tmp_path / "Modelfile").read_text() == (
        f'FROM {tiny_model_dir.resolve()}\nADAPTER ./a.gguf\nPARAMETER stop "<|im_end|>"\n'
    )
    with pytest.raises(InputError, match="Modelfile already exists"):
        export(str(tiny_model_dir), tmp_path / "b.gguf", ollama=True, **arguments)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": ["lm_head"]}, "lm_head is tied .*--to gguf"),
        ({"modules_to_save": ["norm"]}, r"beside A and B.*layernorm\.weight.*; fuse"),
        ({"dora": True}, r"beside A and B.*lora_magnitude_vector"),
        ({"targets": ["embed_tokens"]}, r"beside A and B.*embed_tokens\.lora_embedding_A"),
        ({"init": "pissa"}, "started with pissa.*plain=True"),
    ],
    ids=["tied head", "saved", "dora", "embedding", "pissa"],
)
def test_what_it_cannot_carry_is_refused_with_the_way_out(
    tiny_model_dir: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    _trained(tiny_model_dir, tmp_path / "adapter", **changes)
    with pytest.raises(InputError, match=said):
        export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))
    assert not (tmp_path / "a.gguf").exists()


def test_it_needs_an_adapter_and_is_the_only_one_with_a_modelfile(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is given"):
        export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf-adapter")
    with pytest.raises(InputError, match="choose --to gguf-adapter"):
        export(str(tiny_model_dir), tmp_path / "a.gguf", to="gguf", ollama=True)


def test_another_models_adapter_is_refused(tiny_model_dir: Path, tmp_path: Path, smollm2: Path) -> None:
    _trained(tiny_model_dir, tmp_path / "adapter")
    with pytest.raises(InputError, match="incomplete or for another model"):
        export(str(smollm2), tmp_path / "a.gguf", to="gguf-adapter", adapter=str(tmp_path / "adapter"))


def test_nothing_of_the_base_is_read(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trained(tiny_model_dir, tmp_path / "adapter")
    source = open_source(str(tiny_model_dir))
    monkeypatch.setattr(source.weights, "stored", lambda name: pytest.fail("a weight was read"))
    export_gguf_adapter(source, str(tmp_path / "adapter"), tmp_path / "a.gguf")
    assert torch.isfinite(GGUFFile(tmp_path / "a.gguf").read("blk.0.ffn_up.weight.lora_b")).all()
