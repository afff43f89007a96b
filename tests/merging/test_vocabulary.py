"""Embeddings follow their tokens when vocabularies differ."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from entrenar.recipes.merge import merge
from tests.support.models_on_disk import tensors, write_model, write_tokenizer

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """One model with the tokens a b c (and a padding row), one with c a d e."""
    first = write_model(tmp_path / "first", tensors(0, vocabulary=4))
    second = write_model(tmp_path / "second", tensors(1, vocabulary=4))
    write_tokenizer(first, ["a", "b", "c"])
    write_tokenizer(second, ["c", "a", "d", "e"])
    return [first, second]


def merged(two: list[str], output: Path, source: str, weight: tuple[float, float]) -> dict[str, Tensor]:
    models = [{"model": m, "parameters": {"weight": w}} for m, w in zip(two, weight, strict=True)]
    values = {"merge_method": "linear", "models": models, "base_model": two[0], "tokenizer_source": source}
    merge(values, output)
    return load_file(output / "model.safetensors")


def test_base_keeps_the_bases_tokens(two: list[str], tmp_path: Path) -> None:
    found = merged(two, tmp_path / "out", "base", (0, 1))[EMBEDDING]
    first, second = tensors(0, vocabulary=4)[EMBEDDING], tensors(1, vocabulary=4)[EMBEDDING]
    expected = torch.stack([second[1], first[1], second[0], second[3]])  # b only the first has; a padding row stays
    torch.testing.assert_close(found, expected)


def test_a_models_path_takes_that_models_tokens(two: list[str], tmp_path: Path) -> None:
    found = merged(two, tmp_path / "out", f"model:{two[1]}", (1, 0))
    first, second = tensors(0, vocabulary=4)[EMBEDDING], tensors(1, vocabulary=4)[EMBEDDING]
    torch.testing.assert_close(found[EMBEDDING], torch.stack([first[2], first[0], second[2], second[3]]))
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert list(tokenizer["model"]["vocab"]) == ["c", "a", "d", "e"]


def test_union_has_every_token_and_says_so_everywhere(two: list[str], tmp_path: Path) -> None:
    found = merged(two, tmp_path / "out", "union", (0.5, 0.5))
    first, second = tensors(0, vocabulary=4), tensors(1, vocabulary=4)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    added = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    assert added == {"d": 3, "e": 4}
    for name in (EMBEDDING, "lm_head.weight"):
        assert found[name].shape[0] == 5
        torch.testing.assert_close(found[name][0], (first[name][0] + second[name][1]) / 2)
        torch.testing.assert_close(found[name][4], second[name][3])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 5
