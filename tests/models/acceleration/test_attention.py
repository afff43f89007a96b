"""Our attention in transformers' interface gives what transformers' eager attention gives, whatever the mask."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.models.acceleration import attention
from tests.support.families import FAMILIES, make_family

IDS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(0))
# Two documents in the first row, three in the second.
POSITIONS = torch.tensor([[*range(13), *range(7)], [*range(4), *range(9), *range(7)]])


def hidden(model: PreTrainedModel, implementation: str, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    return model.get_decoder()(input_ids=IDS, use_cache=False, **inputs).last_hidden_state


@pytest.fixture(autouse=True)
def registered() -> None:
    attention.register()


SUPPORTED = [name for name in FAMILIES if name != "gemma2"]  # whose softcapped scores are left to eager attention


@pytest.mark.parametrize("family", SUPPORTED)
def test_plain_causal_and_windows(family: str) -> None:
    model = make_family(family)
    torch.testing.assert_close(hidden(model, attention.NAME), hidden(model, "eager"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SUPPORTED)
def test_packed_documents(family: str) -> None:
    model = make_family(family)
    found, expected = (hidden(model, name, position_ids=POSITIONS) for name in (attention.NAME, "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, hidden(model, attention.NAME), atol=1e-2)  # the documents do matter


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_padding(family: str, side: str) -> None:
    model = make_family(family)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, slice(0, 6) if side == "left" else slice(14, 20)] = 0
    found, expected = (hidden(model, name, attention_mask=mask) for name in (attention.NAME, "eager"))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_and_left_padding() -> None:
    model = make_family("llama")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    texts = []
    for name in (attention.NAME, "eager"):
        model.set_attn_implementation(name)
        texts.append(cast(Any, model).generate(input_ids=IDS, attention_mask=mask, max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)


def test_a_mask_that_is_no_stretch_of_keys_is_left_to_pytorch() -> None:
    seen = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    starts = attention.first_keys(seen)
    assert starts is not None
    assert starts.tolist() == [[0] * 8]
    holes = seen.clone()
    holes[..., 6, 2] = False  # one, as the branch of a tree has it
    assert attention.first_keys(holes) is not None
    holes = holes.clone()  # what was read of a mask is kept with it
    holes[..., 6, 4] = False
    assert attention.first_keys(holes) is None
    ahead = seen.clone()
    ahead[..., 2, 5] = True
    assert attention.first_keys(ahead) is None
    assert attention.first_keys(seen.float()) is None
    falling = torch.eye(8, dtype=torch.bool).tril()[None, None]
    falling[..., 6, :] = torch.arange(8) <= 6
    assert attention.first_keys(falling) is None


def test_a_mask_is_read_once() -> None:
    seen = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    assert attention.first_keys(seen) is attention.first_keys(seen)


def test_gradients() -> None:
    model = make_family("llama").train()
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    found, expected = (
        torch.autograd.grad(hidden(model, name, position_ids=POSITIONS).square().sum(), weight)[0]
        for name in (attention.NAME, "eager")
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
