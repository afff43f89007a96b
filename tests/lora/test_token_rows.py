"""Rows of their own for chosen tokens: base elsewhere, gradients to the rows alone, tied and untied, resized."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from entrenar.core.errors import InputError
from entrenar.lora.attach import attach_lora, trained_parameters
from entrenar.lora.token_rows import TokenRows, resize_vocabulary
from entrenar.models.forward import target_loss


def make(*, tied: bool, gemma: bool = False) -> Any:
    shared = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.2, "tie_word_embeddings": tied,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if gemma:
            return GemmaForCausalLM(GemmaConfig(**shared, head_dim=16)).eval()  # pyright: ignore[reportArgumentType]
        return LlamaForCausalLM(LlamaConfig(**shared)).eval()  # pyright: ignore[reportArgumentType]


def ids() -> Tensor:
    return torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_fresh_rows_change_nothing_and_changed_ones_are_a_changed_weight(tied: bool, gemma: bool) -> None:
    model, expected = make(tied=tied, gemma=gemma), make(tied=tied, gemma=gemma)
    attach_lora(model, rank=2, targets=["q_proj"], token_indices=[3, 49])
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, expected(ids()).logits)
    rows = [module for module in model.modules() if isinstance(module, TokenRows)]
    assert len(rows) == 2
    assert len({id(module.rows) for module in rows}) == (1 if tied else 2)
    with torch.no_grad():
        for index, module in enumerate(rows if not tied else rows[:1]):
            module.rows.add_(0.5 * (index + 1))
        expected.get_input_embeddings().weight[[3, 49]] += 0.5
        if not tied:
            expected.lm_head.weight[[3, 49]] += 1.0
        found = model(torch.tensor([[3, 5, 49, 3]])).logits
        torch.testing.assert_close(found, expected(torch.tensor([[3, 5, 49, 3]])).logits)
    for module, theirs in zip(rows, (expected.get_input_embeddings(), expected.lm_head), strict=True):
        torch.testing.assert_close(module.fused_weight(), theirs.weight.detach())


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_gives_the_rows_the_gradient_of_a_whole_weights_rows(tied: bool) -> None:
    model, expected = make(tied=tied), make(tied=tied)
    attach_lora(model, rank=2, targets=["q_proj"], token_indices=[7, 9])
    tokens = torch.tensor([[7, 1, 9, 2, 7], [4, 9, 9, 1, 0]])
    positions = torch.arange(5).repeat(2, 1)
    target_loss(model, tokens, positions, positions > 0).backward()
    logits = expected(tokens).logits[:, :-1]
    nn.functional.cross_entropy(logits.reshape(-1, 50), tokens[:, 1:].reshape(-1), reduction="sum").backward()
    names = [name for name, _ in trained_parameters(model) if "lora" not in name]
    assert len(names) == (1 if tied else 2)
    rows = [module for module in model.modules() if isinstance(module, TokenRows)]
    wanted = [expected.get_input_embeddings().weight.grad, expected.lm_head.weight.grad]
    for module, gradient in list(zip(rows, wanted, strict=True))[: len(names)]:
        assert module.rows.grad is not None
        assert gradient is not None
        torch.testing.assert_close(module.rows.grad, gradient[[7, 9]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old(tied: bool) -> None:
    model = make(tied=tied)
    before, old = model(ids()).logits, model.get_input_embeddings().weight.detach().clone()
    resize_vocabulary(model, 53)
    resize_vocabulary(model, 10)
    assert model.config.vocab_size == 53
    weight = model.get_input_embeddings().weight
    assert (model.lm_head.weight is weight) is tied
    assert torch.equal(weight[:50], old)
    torch.testing.assert_close(weight[50:], old.mean(0).expand(3, -1))
    after = model(ids()).logits
    assert after.shape[-1] == 53
    torch.testing.assert_close(after[..., :50], before)


@pytest.mark.parametrize(("options", "message"), [
    ({"token_indices": [50]}, r"embed_tokens has no row of its own for each of the tokens 50"),
    ({"token_indices": [3, 3]}, "has no row of its own for each"),
    ({"token_indices": [3], "modules_to_save": ["embed_tokens"]}, "adapted or trained whole"),
    ({"token_indices": [3], "targets": ["q_proj", "embed_tokens"]}, "adapted or trained whole"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    model = make(tied=False)
    with pytest.raises(InputError, match=message):
        attach_lora(model, **{"rank": 2, "targets": ["q_proj"], **options})  # pyright: ignore[reportArgumentType]
