"""Adapters with an embedding and head larger than the base's: room is made for them, or the reason is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from entrenar.core.errors import InputError
from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import attach_lora

V, H = 40, 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "base_model.model."


def base(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=H, intermediate_size=24, num_hidden_layers=1, vocab_size=V, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2, tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip


def weights(model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
    """Of embedding and head."""
    return model.get_parameter(EMBEDDING), model.get_parameter(HEAD)


def adapter(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A plain adapter of q_proj with more tensors and other fields of its config."""
    model = base()
    attach_lora(model, rank=2, targets=["q_proj"])
    save_adapter(model, path)
    file = path / "adapter_model.safetensors"
    save_file(load_file(file) | {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}, file)
    values = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")) | config
    (path / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    return path


def grown(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, H, generator=torch.Generator().manual_seed(seed))


def test_saved_embedding_and_head_of_more_rows_are_taken_whole(tmp_path: Path) -> None:
    whole = {EMBEDDING: grown(V + 3, 1), HEAD: grown(V + 3, 2)}
    model = base()
    load_adapter(model, adapter(tmp_path / "a", whole, modules_to_save=["embed_tokens", "lm_head"]))
    assert torch.equal(weights(model)[0], whole[EMBEDDING])
    assert torch.equal(weights(model)[1], whole[HEAD])
    assert model.config.vocab_size == V + 3


@pytest.mark.parametrize("tied", [True, False])
def test_base_weights_beside_the_adapter_give_the_new_rows(tmp_path: Path, tied: bool) -> None:
    model = base(tied=tied)
    own = {EMBEDDING: weights(model)[0], HEAD: weights(model)[1]}
    beside = {n: torch.cat([w.detach(), grown(2, 3 + (n == HEAD and not tied))]) for n, w in own.items()}
    load_adapter(model, adapter(tmp_path / "a", beside))
    assert torch.equal(weights(model)[0], beside[EMBEDDING])
    assert torch.equal(weights(model)[1], beside[HEAD])
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora" not in n)


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        ({EMBEDDING: grown(V + 3, 1)}, {"modules_to_save": ["embed_tokens"]}, r"no rows for lm_head\.weight"),
        ({EMBEDDING: grown(V, 1)}, {}, r"trained on another base: its model\.embed_tokens\.weight"),
        ({EMBEDDING: grown(V - 2, 1)}, {"modules_to_save": ["embed_tokens"]}, rf"shape \({V - 2}, {H}\) at"),
        ({}, {"trainable_token_indices": [3]}, "do not train the same parameters whole: model.embed_tokens"),
        ({}, {"trainable_token_indices": [10**9]}, f"names token {10**9} for the embedding"),
        ({}, {"trainable_token_indices": {"q_proj": [3]}}, "q_proj"),
    ],
)
def test_rows_that_are_not_there_or_not_this_models_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], sentence: str
) -> None:
    model = base()
    with pytest.raises(InputError, match=sentence):
        load_adapter(model, adapter(tmp_path / "a", tensors, **config))


@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD]])
def test_what_is_saved_over_a_tied_base_without_a_word_of_ties_is_untied(tmp_path: Path, names: list[str]) -> None:
    """As in peft: each copy is on its own, and what is not named stays the base's."""
    model, before = base(tied=True), weights(base(tied=True))[0]
    whole = {name: grown(V, 5 + len(name)) for name in names}
    words = {EMBEDDING: "embed_tokens", HEAD: "lm_head"}
    load_adapter(model, adapter(tmp_path / "a", whole, modules_to_save=[words[name] for name in names]))
    assert torch.equal(weights(model)[0], whole.get(EMBEDDING, before))
    assert torch.equal(weights(model)[1], whole.get(HEAD, before))


def test_two_values_of_what_is_to_stay_tied_are_refused(tmp_path: Path) -> None:
    whole = {EMBEDDING: grown(V, 1), HEAD: grown(V, 2)}
    path = adapter(tmp_path / "a", whole, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(InputError, match="which are tied"):
        load_adapter(base(tied=True), path)
