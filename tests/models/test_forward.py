"""Logits only where a prediction is wanted are those of the whole forward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.models.forward import target_logits

# Three rows of 6 tokens, padded on the right, and which of them are targets.
_ATTENTION = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
_TARGETS = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)


def _llama(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory)


def _gemma2(_: Path) -> PreTrainedModel:
    """An architecture that bends its logits after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def _run(model: PreTrainedModel, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 100, (3, 6), generator=torch.Generator().manual_seed(1))
    logits, labels = target_logits(model, ids, _ATTENTION, targets)
    whole = model(input_ids=ids, attention_mask=_ATTENTION).logits
    rows, columns = targets.nonzero(as_tuple=True)
    assert labels.tolist() == ids[rows, columns].tolist()
    return logits, whole[rows, columns - 1], ids


@pytest.mark.parametrize("make", [_llama, _gemma2])
def test_logits_are_those_that_predict_the_targets(
    tiny_model_dir: Path, make: Callable[[Path], PreTrainedModel]
) -> None:
    model = make(tiny_model_dir)
    logits, expected, _ = _run(model, _TARGETS)
    assert logits.shape == (3, model.config.get_text_config().vocab_size)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_whole_pass(tiny_model_dir: Path) -> None:
    model = _llama(tiny_model_dir)
    logits, expected, _ = _run(model, _TARGETS)
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    ours, theirs = (torch.autograd.grad(values.square().sum(), weight)[0] for values in (logits, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_head_runs_only_on_the_columns_some_row_needs(tiny_model_dir: Path) -> None:
    model = _llama(tiny_model_dir)
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    shapes = []
    head.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    target_logits(model, torch.ones(3, 6, dtype=torch.int64), _ATTENTION, _TARGETS)
    assert shapes == [(3, 3, 64)]


def test_padding_changes_nothing(tiny_model_dir: Path) -> None:
    model = _llama(tiny_model_dir)
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    targets = torch.tensor([[False, False, True, True, True]])
    alone, _ = target_logits(model, ids, torch.ones_like(ids), targets)
    padded = [nn.functional.pad(tensor, (0, 4)) for tensor in (ids, torch.ones_like(ids), targets)]
    together, _ = target_logits(model, *padded)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_choose_positions_is_an_input_error() -> None:
    class Fixed(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            raise AssertionError("not to be run")

    with pytest.raises(InputError, match="Fixed cannot make logits for chosen positions"):
        target_logits(cast(PreTrainedModel, Fixed()), torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))
