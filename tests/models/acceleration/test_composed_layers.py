"""Decoder layers as a GPU runs them, here on the CPU: what they are made of asks nowhere where it runs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from entrenar.layers import composed_blocks
from entrenar.layers.recompute import Recompute
from entrenar.models.acceleration import activations, fast_layers, layer_forward
from entrenar.models.acceleration.activations import ladder, set_recompute
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from tests.support.families import make_family
from tests.support.fast_models import ALIKE, IDS, POSITIONS, adapted, gradients, train_norms
from tests.support.learning import saved_bytes


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed_blocks, "_is_on_gpu", lambda _: True)
    monkeypatch.setattr(fast_layers, "serves", lambda _: False)
    monkeypatch.setattr(layer_forward, "serves", lambda _: False)
    monkeypatch.setattr(activations, "recompute_inside", lambda _: False)


def pair(family: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel, int]:
    """A fast model, the same one plain, both in float32, and how many layers of the fast one have the new forward."""
    plain = make_family(family, torch.float32, initializer_range=0.1, **changes).requires_grad_(False)
    fast = copy.deepcopy(plain)
    layers = use_fast_forwards(fast)["layers"]
    return adapted(fast), adapted(plain), layers


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("family", ALIKE)
def test_the_familys_logits_and_gradients(family: str) -> None:
    fast, plain, layers = pair(family)
    assert layers == 2
    for inputs in ({}, {"position_ids": POSITIONS}):
        assert_same(gradients(fast, **inputs), gradients(plain, **inputs))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "phi3", "cohere"])
def test_others_stay_with_their_modules(family: str) -> None:
    fast, plain, layers = pair(family)
    assert layers == 0
    assert_same(gradients(fast), gradients(plain))


def test_heads_of_any_width() -> None:
    fast, plain, layers = pair("llama", head_dim=48)
    assert layers == 2
    assert_same(gradients(fast), gradients(plain))


def test_what_is_kept_changes_memory_not_numbers() -> None:
    fast, _, _ = pair("llama")
    fast.train()
    assert ladder(fast) == (Recompute.NOTHING, Recompute.ALL)
    results = []
    for choices in ([Recompute.NOTHING] * 2, [Recompute.ALL, Recompute.NOTHING], [Recompute.ALL] * 2):
        set_recompute(fast, choices)
        results.append(gradients(fast))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    width = fast.config.get_text_config().hidden_size * torch.float32.itemsize
    most, least = saved_bytes(fast, Recompute.NOTHING), saved_bytes(fast, Recompute.ALL)
    assert 2 * width < least < most / 3  # what each of two layers begins with, and what the rest of the model keeps


def test_a_cache_and_padding() -> None:
    fast, plain, _ = pair("qwen3")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :6] = 0
    found, expected = ([], [])
    for model, outputs in ((fast, found), (plain, expected)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for begin, end in ((0, 17), (17, 18), (18, 19), (19, 20)):
                part = slice(begin, end)
                logits = model(
                    input_ids=IDS[:, part], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
                ).logits
                outputs.append(logits[mask[:, part].bool()])
        outputs.append(model(input_ids=IDS, attention_mask=mask, use_cache=False).logits[mask.bool()])
    assert_same(tuple(found), tuple(expected))


def test_autocast() -> None:
    fast, plain, _ = pair("llama")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = gradients(fast), gradients(plain)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.03 * other.norm()


def test_checkpointing_with_a_cache_is_the_classs_own() -> None:
    fast, plain, _ = pair("llama")
    fast.train()
    set_recompute(fast, [Recompute.ALL] * 2)
    found, expected = [], []
    for model, results in ((fast, found), (plain, expected)):
        logits = model(input_ids=IDS).logits
        logits.square().mean().backward()
        results += [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    assert_same(tuple(found), tuple(expected))


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "q_norm"])
def test_norms_that_are_trained_beside_the_adapter(name: str) -> None:
    fast, plain, _ = pair("qwen3")
    for model in (fast, plain):
        train_norms(model, name)
    assert_same(gradients(fast), gradients(plain))
    with torch.no_grad():
        assert_same(*((model(input_ids=IDS, use_cache=False).logits,) for model in (fast, plain)))


def test_a_copy_of_a_model_has_norms_of_its_own() -> None:
    fast, _, _ = pair("llama")
    other = copy.deepcopy(fast)
    before = gradients(fast)
    assert_same(gradients(other), before)
    for layer in range(2):
        norm: Any = other.get_submodule(f"model.layers.{layer}.input_layernorm")
        norm.weight.data *= 2
    assert (gradients(other)[0] - before[0]).norm() > 0.01 * before[0].norm()
    assert_same(gradients(fast), before)


def test_hooks_and_trained_norms_are_the_classs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain, _ = pair("llama")
    expected = plain(input_ids=IDS, use_cache=False).logits
    monkeypatch.setattr(composed_blocks, "after_attention", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fast(input_ids=IDS, use_cache=False)
    for layer in range(2):
        norm: Any = fast.get_submodule(f"model.layers.{layer}.input_layernorm")
        norm.weight.requires_grad_()
    assert_same((fast(input_ids=IDS, use_cache=False).logits,), (expected,))
    for layer in range(2):
        norm: Any = fast.get_submodule(f"model.layers.{layer}.input_layernorm")
        norm.weight.requires_grad_(False)
        fast.get_submodule(f"model.layers.{layer}.mlp").register_forward_hook(lambda *_: None)
    assert_same((fast(input_ids=IDS, use_cache=False).logits,), (expected,))
