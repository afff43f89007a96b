"""Decoder layers in two native calls: the families' numbers in bfloat16, and calls that go the class's own way."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from entrenar.layers import residual_blocks
from entrenar.layers.recompute import Recompute
from entrenar.models.acceleration import attention, layer_forward
from entrenar.models.acceleration.activations import set_recompute
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from tests.support.families import make_family
from tests.support.fast_models import ALIKE, IDS, POSITIONS, adapted, gradients, train_norms

pytestmark = pytest.mark.usefixtures("native_path")


def pair(family: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel, int]:
    """A fast model, the same one plain in float32, and how many layers of the fast one have the new forward."""
    plain = make_family(family, torch.bfloat16, initializer_range=0.1, **changes).requires_grad_(False)
    fast = copy.deepcopy(plain)
    layers = use_fast_forwards(fast)["layers"]
    return adapted(fast), adapted(plain.float()), layers


def close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all((one - other).norm() < 0.04 * other.norm() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ALIKE)
def test_the_familys_logits_and_gradients(family: str) -> None:
    fast, plain, layers = pair(family)
    assert layers == 2
    for inputs in ({}, {"position_ids": POSITIONS}):
        assert close(gradients(fast, **inputs), gradients(plain, **inputs))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "cohere"])
def test_others_stay_with_their_modules(family: str) -> None:
    fast, plain, layers = pair(family)
    assert layers == 0
    assert close(gradients(fast), gradients(plain))


@pytest.mark.parametrize(("multiplier", "layers"), [(0.9, 0), (1.0, 2)])
def test_a_residual_that_is_scaled_is_noticed(multiplier: float, layers: int) -> None:
    assert pair("granite", residual_multiplier=multiplier)[2] == layers


@pytest.mark.parametrize(("width", "layers"), [(16, 0), (48, 0), (64, 2)])
def test_heads_of_a_width_the_kernels_do_not_take(width: int, layers: int) -> None:
    fast, plain, found = pair("llama", head_dim=width)
    assert found == layers
    assert close(gradients(fast), gradients(plain))


def test_what_is_kept_changes_memory_not_numbers() -> None:
    fast, _, _ = pair("llama")
    results = []
    for choices in ([Recompute.NOTHING] * 2, [Recompute.CHEAP] * 2, [Recompute.ALL, Recompute.NOTHING]):
        set_recompute(fast, choices)
        results.append(gradients(fast))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    with pytest.raises(ValueError):
        set_recompute(fast, [Recompute.NOTHING])


def test_calls_that_ask_for_more_go_the_classs_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain, _ = pair("llama")

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the block was used")

    monkeypatch.setattr(layer_forward, "decoder_layer", refuse)
    with pytest.raises(AssertionError):
        fast(input_ids=IDS, use_cache=False)
    assert fast.generate(input_ids=IDS, max_new_tokens=3, do_sample=False).shape == (2, 23)  # pyright: ignore[reportCallIssue]
    layer: Any = fast.get_submodule("model.layers.0")
    hook = layer.self_attn.register_forward_hook(lambda *_: None)
    other: Any = fast.get_submodule("model.layers.1.mlp")
    second = other.down_proj.register_forward_hook(lambda *_: None)
    assert close(
        (fast(input_ids=IDS, use_cache=False).logits.float(),), (plain(input_ids=IDS, use_cache=False).logits,)
    )
    hook.remove()
    second.remove()
    fast.set_attn_implementation("eager")
    fast(input_ids=IDS, use_cache=False)
    fast.set_attn_implementation(attention.NAME)


@pytest.mark.parametrize("family", ALIKE)
def test_token_by_token_with_a_cache_all_but_attending_is_native(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain, _ = pair(family)
    calls: list[int] = []
    own = residual_blocks.after_attention

    def counted(h: Tensor, *args: Any) -> Tensor:
        calls.append(h.shape[1])
        return own(h, *args)

    monkeypatch.setattr(residual_blocks, "after_attention", counted)
    for again in range(2):
        with torch.no_grad():
            found, expected = [], []
            for model, outputs in ((fast, found), (plain, expected)):
                cache = DynamicCache(config=model.config)
                for part in (IDS[:, :17], *IDS[:, 17:].split(1, dim=1)):
                    outputs.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits.float())
        assert close(tuple(found), tuple(expected))
        assert calls == ([] if again else [17, 17, 1, 1, 1, 1, 1, 1])
        calls.clear()
        fast.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *_: None)
        fast.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(lambda *_: None)


def test_with_a_cache_and_gradients_the_layer_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _, _ = pair("llama")
    monkeypatch.setattr(residual_blocks, "after_attention", lambda *_: 1 / 0)
    fast(input_ids=IDS, past_key_values=DynamicCache(config=fast.config), use_cache=True).logits.sum().backward()


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "q_norm"])
def test_norms_that_are_trained_beside_the_adapter(name: str) -> None:
    fast, plain, _ = pair("qwen3")
    for model in (fast, plain):
        train_norms(model, name)
    assert close(gradients(fast), gradients(plain))
    with torch.no_grad():
        found, expected = (model(input_ids=IDS, use_cache=False).logits.float() for model in (fast, plain))
    assert close((found,), (expected,))


def test_padding_on_the_left_is_masked() -> None:
    fast, plain, _ = pair("llama")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    found, expected = (
        model(input_ids=IDS, attention_mask=mask, use_cache=False).logits.float() for model in (fast, plain)
    )
    assert close((found[mask.bool()],), (expected[mask.bool()],))
