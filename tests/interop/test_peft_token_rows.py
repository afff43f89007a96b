"""Trained rows of chosen tokens (peft's `trainable_token_indices`): its directory both ways, numbers and gradients."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrenar.lora.adapter_io import load_adapter, save_adapter
from entrenar.lora.attach import attach_lora
from entrenar.lora.token_rows import TokenRows, resize_vocabulary
from entrenar.opening.load import load
from entrenar.recipes.export import export

pytestmark = pytest.mark.interop


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=request.param, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def their_base(base: Path, new: int) -> Any:
    """With `new` rows beyond those of the file, all zeros until an adapter fills them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    old = model.config.vocab_size
    model.resize_token_embeddings(old + new, mean_resizing=False)
    return model


def some_ids(old: int) -> Tensor:
    return torch.tensor([[1, 7, old, 5, old + 1, 9, 7, 2], [old + 1, 3, 7, 7, old, 2, 8, 11]])


@pytest.mark.parametrize("whole", [False, True], ids=["rows alone", "embedding saved too"])
@pytest.mark.parametrize("names", [["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_rows_of_pefts(base: Path, tmp_path: Path, names: list[str], whole: bool) -> None:
    theirs = their_base(base, 2)
    old = theirs.config.vocab_size - 2
    tokens, ids = [7, old, old + 1], some_ids(old)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=dict.fromkeys(names, tokens))
    theirs = peft.get_peft_model(theirs, config)
    for index, (_, parameter) in enumerate(sorted(theirs.named_parameters())):
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=whole)
    ours, _ = load(str(base), "none", dtype="float32")
    load_adapter(ours, tmp_path / "adapter")
    for model in (ours, theirs.eval()):
        model(input_ids=ids, labels=ids).loss.backward()
    known = [*range(old)] if names == ["embed_tokens"] and not ours.config.tie_word_embeddings else [*range(old + 2)]
    with torch.no_grad():  # an untied head's new rows are ours and theirs, each made in its own way
        found, expected = (model(input_ids=ids).logits[..., known] for model in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if known[-1] == old + 1:
        gradients = {n: p.grad for n, p in theirs.named_parameters() if "trainable_tokens" in n and p.grad is not None}
        for name, module in ours.named_modules():
            if isinstance(module, TokenRows) and not module.is_tied:
                peer = gradients[f"base_model.model.{name}.token_adapter.trainable_tokens_delta.default"]
                assert module.rows.grad is not None
                torch.testing.assert_close(module.rows.grad, peer, rtol=1e-3, atol=1e-5)


def test_rows_of_ours_are_loaded_by_peft(base: Path, tmp_path: Path) -> None:
    ours, tokenizer = load(str(base), "none", dtype="float32")
    old = ours.config.vocab_size
    tokenizer.add_tokens(["<a>", "<b>"])
    resize_vocabulary(ours, old + 2)
    attach_lora(ours, rank=2, targets=["q_proj"], token_indices=[7, old, old + 1])
    for index, parameter in enumerate(p for p in ours.parameters() if p.requires_grad):
        with torch.no_grad():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    save_adapter(ours, tmp_path / "adapter", tokenizer=tokenizer)
    theirs = peft.PeftModel.from_pretrained(their_base(base, 2), str(tmp_path / "adapter")).eval()
    ids = some_ids(old)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    again, _ = load(str(base), "none", dtype="float32")
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, ours(ids).logits)
    export(str(base), tmp_path / "fused", adapter=str(tmp_path / "adapter"), type="f32")
    merged = theirs.merge_and_unload()
    values = load_file(tmp_path / "fused" / "model.safetensors")
    torch.testing.assert_close(values["model.embed_tokens.weight"], merged.get_input_embeddings().weight.detach())
    if "lm_head.weight" in values:
        torch.testing.assert_close(values["lm_head.weight"], merged.lm_head.weight.detach())
