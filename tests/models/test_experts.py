"""Mixtures of experts: the files' matrices one by one, transformers' numbers, quantized expert by expert."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.lora.attach import attach_lora
from entrenar.models.experts import Experts
from entrenar.opening.load import load
from entrenar.quant.tensor import quantize
from tests.support.mixtures import MIXTURES, save_mixture

Saved = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture
def saved(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Saved:
    return lambda name: (tmp_path / name, save_mixture(name, tmp_path / name, tiny_tokenizer))


def ids(count: int = 33) -> Tensor:
    return torch.randint(0, 300, (2, count), generator=torch.Generator().manual_seed(1))


def dequantized(directory: Path, format: str, double: bool) -> PreTrainedModel:
    """transformers' model over the weights that the format makes of the files'."""
    values = load_file(directory / "model.safetensors")
    head = {"lm_head.weight", "model.embed_tokens.weight"}
    for name, weight in values.items():
        if weight.dim() == 2 and name not in head and not name.endswith(("moe.gate.weight", "mlp.gate.weight")):
            values[name] = quantize(weight, format=format, double_quant=double).dequantize()
    other = directory.with_name(f"{directory.name}-{format}")
    other.mkdir()
    for file in directory.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_file(values, other / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)


@pytest.mark.parametrize("name", MIXTURES)
def test_unquantized_it_has_transformers_logits(saved: Saved, name: str) -> None:
    directory, theirs = saved(name)
    ours, _ = load(str(directory), "none", dtype="float32")
    assert any(isinstance(module, Experts) for module in ours.modules())
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    ("format", "double"), [("nf4", False), ("nf4", True), ("fp4", True), ("int4", True), ("int8", False)]
)
def test_quantized_it_is_transformers_model_over_the_dequantized_weights(
    saved: Saved, name: str, format: str, double: bool
) -> None:
    directory, _ = saved(name)
    ours, _ = load(str(directory), format, double_quant=double, dtype="float32")
    with torch.no_grad():
        expected = dequantized(directory, format, double)(ids()).logits
        torch.testing.assert_close(ours(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    experts = next(module for module in ours.modules() if isinstance(module, Experts))
    weight = experts.gate_up_proj.each()[0]
    held = sum(part.numel() * part.element_size() for part in weight.parameters())
    assert held < 1.3 * weight.count * weight.d_out * weight.d_in * (1 if format == "int8" else 0.5)


@pytest.mark.parametrize("name", MIXTURES)
def test_bfloat16_is_near(saved: Saved, name: str) -> None:
    directory, theirs = saved(name)
    ours, _ = load(str(directory), "none", dtype="bfloat16")
    with torch.no_grad():
        found, expected = ours(ids()).logits.float(), theirs(ids()).logits
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_a_token_may_choose_no_expert(saved: Saved) -> None:
    """transformers marks such a place with the number of experts."""
    directory, theirs = saved("mixtral")
    ours, _ = load(str(directory), "none", dtype="float32")
    x, index = torch.randn(5, 64), torch.tensor([[0, 4], [4, 4], [1, 2], [3, 0], [2, 4]])
    share = torch.rand(5, 2)
    one, other = (model.get_submodule("model.layers.0.mlp.experts") for model in (ours, theirs))
    theirs.set_experts_implementation("eager")
    torch.testing.assert_close(one(x, index, share), other(x, index, share), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize_as", ["none", "nf4"])
def test_gradients_of_input_shares_and_factors(saved: Saved, quantize_as: str) -> None:
    """Against autograd through transformers' forward over base + scale·B·A."""
    directory, _ = saved("qwen3_moe")
    model, _ = load(str(directory), quantize_as, dtype="float32")
    attach_lora(model, rank=3, alpha=6, targets=["experts.gate_up_proj", "experts.down_proj"])
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    layers = [experts.gate_up_proj, experts.down_proj]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(21, 64, generator=generator) for _ in range(2))
    index = torch.rand(21, 6, generator=generator).argsort(1)[:, :3]
    index[index == 5] = 4  # one expert that nobody chooses
    share = torch.rand(21, 3, generator=generator)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, share)]
    experts(leaves[0], index, leaves[1]).backward(grad)
    found = [leaf.grad for leaf in leaves] + [p.grad for layer in layers for p in (layer.lora_a, layer.lora_b)]

    wide = [tensor.double().requires_grad_() for tensor in (x, share)]
    factors = [p.detach().double().requires_grad_() for layer in layers for p in (layer.lora_a, layer.lora_b)]
    plain = [
        torch.stack([torch.cat([s.to_f32(e) for s in layer.base.each()]) for e in range(6)]).double()
        for layer in layers
    ]
    weights = [
        base + 2 * torch.einsum("ore,eri->eoi", b.view(len(b), -1, 6), a.view(6, -1, a.shape[1]))
        for base, a, b in zip(plain, factors[::2], factors[1::2], strict=True)
    ]
    total = torch.zeros_like(wide[0])
    for expert in range(6):
        tokens, places = torch.where(index == expert)
        gate, up = (wide[0][tokens] @ weights[0][expert].T).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ weights[1][expert].T
        total = total.index_add(0, tokens, y * wide[1][tokens, places, None])
    total.backward(grad.double())
    for one, other in zip(found, [leaf.grad for leaf in (*wide, *factors)], strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_all_linear_leaves_the_experts_alone(saved: Saved) -> None:
    directory, _ = saved("mixtral")
    model, _ = load(str(directory), "nf4", dtype="float32")
    names = attach_lora(model, rank=2)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(("options", "message"), [
    ({"dropout": 0.1}, "experts take no dropout"),
    ({"dora": True}, "DoRA is for linear layers"), ({"init": "gaussian"}, "experts are not started with gaussian"),
])  # fmt: skip
def test_what_experts_cannot_have_is_refused(saved: Saved, options: dict[str, Any], message: str) -> None:
    directory, _ = saved("mixtral")
    model, _ = load(str(directory), "nf4", dtype="float32")
    with pytest.raises(InputError, match=message):
        attach_lora(model, **{"rank": 2, "targets": ["experts.down_proj"], **options})


def test_a_missing_expert_is_named(saved: Saved) -> None:
    directory, _ = saved("qwen3_moe")
    values = load_file(directory / "model.safetensors")
    del values["model.layers.0.mlp.experts.5.up_proj.weight"]
    save_file(values, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 tensors of .*experts\.5\.up_proj\.weight"):
        load(str(directory), "nf4")
