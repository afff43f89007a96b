"""What layers keep: fewer bytes, the same gradients, for native layers and for those that are run twice."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.layers.recompute import Recompute
from entrenar.lora.attach import attach_lora
from entrenar.models.acceleration.activations import decoder_layers, ladder, set_recompute
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from entrenar.models.forward import target_loss
from tests.support.families import FAMILIES, make_family
from tests.support.fast_models import IDS, quantized
from tests.support.learning import saved_bytes


def adapted(family: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = quantized(make_family(family, dtype).requires_grad_(False))
    use_fast_forwards(model)
    attach_lora(model, rank=4, alpha=8, dropout=dropout)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model: PreTrainedModel) -> Tensor:
    model.zero_grad()
    torch.manual_seed(1)
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    target_loss(model, IDS, positions, positions > 0).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_less_is_kept_and_the_gradients_stay_to_the_bit(family: str) -> None:
    model = adapted(family)
    assert ladder(model)[0] is Recompute.NOTHING
    assert ladder(model)[-1] is Recompute.ALL
    sizes = [saved_bytes(model, choice) for choice in ladder(model)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.7 * sizes[0]
    expected = gradients(copy.deepcopy(adapted(family)))
    for choices in ([Recompute.ALL] * 2, [Recompute.ALL, Recompute.NOTHING], [Recompute.NOTHING] * 2):
        set_recompute(model, choices)
        assert torch.equal(gradients(model), expected)


def test_dropout_is_drawn_the_same_again() -> None:
    model, other = adapted("llama", dropout=0.3), adapted("llama", dropout=0.3)
    set_recompute(model, [Recompute.ALL] * 2)
    assert torch.equal(gradients(model), gradients(other))
    other.eval()
    assert not torch.equal(gradients(model), gradients(other))


def test_nothing_is_run_twice_outside_training() -> None:
    model: Any = adapted("llama")
    set_recompute(model, [Recompute.ALL] * 2)
    model.eval()
    calls: list[object] = []
    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    assert len(calls) == 1


def test_what_is_counted_is_what_is_held() -> None:
    """Against the sizes of a llama layer in float32: the second norm's input, gate and up, q, k, v and o."""
    model = adapted("llama")
    hidden, inner, queries, keys = 64, 96, 128, 64
    grown = saved_bytes(model, Recompute.NOTHING) - saved_bytes(model, Recompute.ALL)
    expected = 2 * 4 * (hidden + 2 * inner + 2 * queries + 2 * keys)  # of two layers
    assert 0.9 * expected <= grown <= 1.3 * expected


def test_every_layer_needs_a_choice() -> None:
    model = adapted("llama")
    assert len(decoder_layers(model)) == 2
    with pytest.raises(ValueError):
        set_recompute(model, [Recompute.NOTHING])
