"""A base is known by its content: not by its name or age, and any training of it shows."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from entrenar.opening.source import open_source
from entrenar.recipes.export import export
from entrenar.recipes.identity import base_identity


def identity(path: Path) -> str:
    return base_identity(open_source(str(path), with_tokenizer=False))


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def test_a_copy_of_any_age_is_the_same(tiny_model_dir: Path, copy: Path) -> None:
    os.utime(copy / "model.safetensors", (1, 1))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "99.0"}))
    assert identity(copy) == identity(tiny_model_dir)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_a_training_step_of_one_tensor_shows(tiny_model_dir: Path, copy: Path, name: str) -> None:
    """Size and time are put back."""
    weights, file = load_file(copy / "model.safetensors"), copy / "model.safetensors"
    before = file.stat()
    weights[name] += 1e-4 * torch.randn_like(weights[name])
    save_file(weights, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert identity(copy) != identity(tiny_model_dir)


def test_another_config_shows(tiny_model_dir: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert identity(copy) != identity(tiny_model_dir)


def test_a_ggufs_blocks_and_keys_are_told_apart(tiny_model_dir: Path, tmp_path: Path) -> None:
    files = [export(str(tiny_model_dir), tmp_path / f"{t}.gguf", to="gguf", type=t) for t in ("q8_0", "q4_0")]
    again = Path(shutil.copy(files[0], tmp_path / "copy.gguf"))
    assert identity(again) == identity(files[0]) != identity(files[1])


def test_large_tensors_are_sampled_from_end_to_end(copy: Path) -> None:
    """Of 1 MB: a change at its beginning, at its end, and of every row somewhere."""
    weights, file = load_file(copy / "model.safetensors"), copy / "model.safetensors"
    weights["model.embed_tokens.weight"] = torch.zeros(4096, 64)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 4096}))
    found = set()
    for place in (slice(0, 0), slice(0, 1), slice(-1, None), slice(None, None, 8)):
        changed = weights["model.embed_tokens.weight"].clone()
        changed[place] = 1
        save_file(weights | {"model.embed_tokens.weight": changed}, file, {"format": "pt"})
        found.add(identity(copy))
    assert len(found) == 4
