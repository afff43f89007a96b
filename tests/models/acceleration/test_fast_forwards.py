"""Faster forwards: the families' numbers stay theirs, quantized and adapted too; what does not agree stays."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from entrenar.lora.attach import attach_lora
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from tests.support.families import FAMILIES, make_family
from tests.support.fast_models import IDS, POSITIONS, quantized


def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False, **inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_logits_and_gradients_stay_the_same(family: str) -> None:
    plain = make_family(family)
    fast = copy.deepcopy(plain)
    counts = use_fast_forwards(fast)
    assert counts["norms"] > 0 or family == "cohere"  # whose norm subtracts the mean
    name = next(name for name, _ in plain.named_parameters() if name.endswith("layers.0.mlp.down_proj.weight"))
    for inputs in ({}, {"position_ids": POSITIONS}):
        results = []
        for model in (fast, plain):
            found = logits(model, **inputs)
            results.append((found, *torch.autograd.grad(found.square().sum(), model.get_parameter(name))))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.detach().abs().max()))


def test_llamas_modules_are_all_recognised() -> None:
    counts = use_fast_forwards(make_family("llama"))
    assert counts == {"norms": 5, "gated MLPs": 2, "heads": 1, "attention": 2, "layers": 0}  # which need bfloat16


def test_quantized_and_adapted_layers_in_bfloat16() -> None:
    plain = quantized(make_family("llama", torch.bfloat16))
    exact, fast = (copy.deepcopy(plain) for _ in range(2))
    assert use_fast_forwards(fast)["gated MLPs"] == 2
    gradients = []
    for model in (fast, plain, exact.float()):
        torch.manual_seed(0)
        attach_lora(model, rank=4, alpha=8)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        logits(model).float().square().sum().backward()
        trained = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert len(trained) == 2 * 14
        gradients.append(torch.cat(trained))
    ours, plains = ((each - gradients[2]).norm() / gradients[2].norm() for each in gradients[:2])
    assert ours < 0.05
    assert ours < 1.5 * plains  # no less exact than PyTorch's modules in bfloat16


def test_generation_is_the_same() -> None:
    plain = make_family("qwen3")
    fast = copy.deepcopy(plain)
    use_fast_forwards(fast)
    texts = [cast(Any, model).generate(input_ids=IDS, max_new_tokens=8, do_sample=False) for model in (fast, plain)]
    assert torch.equal(*texts)


class OddNorm(LlamaRMSNorm):
    """Looks like the known one, and is not."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.1


class OddMLP(LlamaMLP):
    """Looks like the known one, and is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.1


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_the_head_gets_rows_that_lie_together(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_family("llama")
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    strides: list[tuple[int, ...]] = []
    own = nn.Linear.forward

    def seen(self: nn.Linear, x: Tensor) -> Tensor:
        strides.append(x.stride())
        return own(self, x)

    use_fast_forwards(model)
    monkeypatch.setattr(nn.Linear, "forward", seen)
    last = torch.randn(rows, 9, head.in_features, requires_grad=True)
    x = last[:, -1:]
    found = head(x)
    assert found.shape == (rows, 1, head.out_features)
    assert strides == [(head.in_features, 1)]
    torch.testing.assert_close(found, own(head, x))
    assert torch.equal(torch.autograd.grad(found.sum(), last)[0], torch.autograd.grad(own(head, x).sum(), last)[0])


def test_what_looks_alike_but_does_not_agree_stays() -> None:
    model = make_family("llama")
    layer: Any = model.get_submodule("model.layers.0")
    layer.input_layernorm.__class__, layer.mlp.__class__ = OddNorm, OddMLP
    expected = logits(model)
    counts = use_fast_forwards(model)
    assert counts == {"norms": 4, "gated MLPs": 1, "heads": 1, "attention": 2, "layers": 0}
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_an_epsilon_of_another_name_or_value_is_noticed() -> None:
    model = make_family("llama", rms_norm_eps=1e-3)
    expected = logits(model)
    use_fast_forwards(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_a_hook_on_a_projection_is_still_called() -> None:
    model = make_family("llama")
    use_fast_forwards(model)
    called: list[str] = []
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        model.get_submodule(f"model.layers.1.{name}").register_forward_hook(lambda *_, name=name: called.append(name))
    logits(model)
    assert called == ["self_attn.k_proj", "mlp.up_proj"]


def test_the_norms_and_activations_results_are_not_kept() -> None:
    model = quantized(make_family("llama"))
    use_fast_forwards(model)
    attach_lora(model, rank=4, alpha=8)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 3 and tensor.shape[:2] == IDS.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.shape[-1]
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    assert found.requires_grad
    # Of each layer: two inputs of its norms, gate and up; of the attention 4-D tensors. And the last norm's input.
    assert sorted(kept.values()) == sorted([64, 64, 96, 96, 128] * 2 + [64])
