"""Which norms and gated MLPs are recognised: every look-alike by what sets it apart, whatever its weights are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from entrenar.models.acceleration.agreement import only_match
from entrenar.models.acceleration.recognised import activation_kind, gated_mlp_kind, norm_kind
from entrenar.models.acceleration.watched import outcome_over, takes_one_tensor
from entrenar.ops.elementwise.gated_activation import gated_activation
from entrenar.ops.elementwise.rms_norm import rms_norm

WIDTH = 64
WEIGHTS = {
    "large": torch.linspace(20, 90, WIDTH),  # of Gemma 3 270M: in bfloat16 the 1 is lost beside them
    "near 0": torch.linspace(-1e-3, 1e-3, WIDTH),
    "near -1": torch.linspace(-1.001, -0.999, WIDTH),
    "zeros": torch.zeros(WIDTH),
    "ones": torch.ones(WIDTH),
    "-1": -torch.ones(WIDTH),
    "usual": torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)),
}
KNOWN: dict[type[Any], float] = {
    LlamaRMSNorm: 0.0, Olmo2RMSNorm: 0.0, T5LayerNorm: 0.0, Gemma4RMSNorm: 0.0, nn.RMSNorm: 0.0,
    GemmaRMSNorm: 1.0, Gemma3RMSNorm: 1.0, Qwen3NextRMSNorm: 1.0,
}  # fmt: skip


def with_weight(norm: Any, weight: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    norm.weight = nn.Parameter(weight.clone())
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_a_norms_offset_is_its_classs(kind: Any, weight: str, dtype: torch.dtype) -> None:
    norm = with_weight(kind(WIDTH, eps=1e-6), WEIGHTS[weight], dtype)
    assert norm_kind(norm) == (1e-6, KNOWN[kind])
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, own = rms_norm(x, norm.weight, 1e-6, KNOWN[kind]).float(), norm(x).float()
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, own, rtol=tolerance, atol=1e-30)


def test_a_weight_beside_which_nothing_can_be_told_is_left_alone() -> None:
    assert norm_kind(with_weight(GemmaRMSNorm(WIDTH), torch.full((WIDTH,), 1e7))) is None


class Shifted(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return LlamaRMSNorm.forward(self, hidden_states) + 1e-4


class Half(LlamaRMSNorm):
    """Of an offset that is neither."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)) * (self.weight + 0.5)


class Absolute(LlamaRMSNorm):
    """The same for weights above 0."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight.abs()


class OutsideEps(LlamaRMSNorm):
    """The same but for small inputs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Clipped(LlamaRMSNorm):
    """The same but for large inputs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float().clamp(-1e3, 1e3)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class InTraining(LlamaRMSNorm):
    """The same but in training."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float() * (2.0 if self.training else 1.0)
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class Counting(LlamaRMSNorm):
    """Writes to itself."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        x = hidden_states.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


class Optional(LlamaRMSNorm):
    """Takes a gate if it is given one."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = hidden_states.float() * (1 if gate is None else gate)
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


ODD = [Shifted, Half, Absolute, OutsideEps, Clipped, Centred, InTraining, Counting, Optional, CohereLayerNorm,
       MambaRMSNormGated, GraniteMoeHybridRMSNormGated, nn.LayerNorm]  # fmt: skip


@pytest.mark.parametrize("weight", ["usual", "ones"])
@pytest.mark.parametrize("kind", ODD, ids=lambda kind: kind.__name__)
def test_other_norms_stay(kind: Any, weight: str) -> None:
    options = {"group_size": WIDTH} if "Gated" in kind.__name__ else {}
    assert norm_kind(with_weight(kind(WIDTH, eps=1e-5, **options), WEIGHTS[weight])) is None


def test_activations_are_distinguished_far_out_too() -> None:
    found = {name: activation_kind(ACT2FN[name]) for name in ACT2FN if name != "xielu"}
    gelus, tanhs = {"gelu", "gelu_python"}, {
        "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh",
    }  # fmt: skip
    expected = dict.fromkeys(gelus, "gelu") | dict.fromkeys(tanhs, "gelu_tanh") | {"silu": "silu", "swish": "silu"}
    assert found == {name: expected.get(name) for name in found}  # gelu_10 among the rest: clipped at 10
    assert activation_kind(nn.PReLU()) is None
    assert activation_kind(lambda x: nn.functional.silu(x.clamp(max=7))) is None
    assert activation_kind(lambda x: x * torch.sigmoid(1.702 * x)) is None


class Swapped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Limited(LlamaMLP):
    """As gpt-oss and DeepSeek V4 clip."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x).clamp(-7, 7))


class PlusOne(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class Scaled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.001


class OtherInput(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x * 1.0))


class WithState(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y * 2 if self.training else y


MLP = LlamaConfig(hidden_size=64, intermediate_size=8)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_gated_mlps_activation(act: str) -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=8, hidden_act=act)
    expected = {"gelu_pytorch_tanh": "gelu_tanh"}.get(act, act)
    assert gated_mlp_kind(LlamaMLP(config)) == expected
    z = torch.linspace(-9, 9, 100, dtype=torch.float64)
    torch.testing.assert_close(gated_activation(z, torch.ones_like(z), expected), ACT2FN[act](z), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [Swapped, Limited, PlusOne, Scaled, OtherInput, WithState])
def test_other_mlps_stay(kind: type[LlamaMLP]) -> None:
    assert gated_mlp_kind(kind(MLP)) is None


@pytest.mark.parametrize("act", ["gelu_10", "quick_gelu", "relu", "xielu"])
def test_other_activations_stay(act: str) -> None:
    assert gated_mlp_kind(LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=8, hidden_act=act))) is None


def test_hypotheses_that_cannot_be_distinguished_are_none() -> None:
    a = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert only_match(a.float(), [a, a + 1]) == 0
    assert only_match(a.float(), [a + 1, a]) == 1
    assert only_match(a, [a, a * (1 + 1e-6)]) is None  # both would do
    assert only_match(a, [a, a * (1 + 1e-4)]) is None  # one would do, the other is too near
    assert only_match(a * 1.01, [a, a + 1]) is None
    assert only_match(a.expand(2, 3), [a]) is None
    assert only_match(a * torch.nan, [a]) is None


class ByName(LlamaRMSNorm):
    """Asks for the same by other means: a method, and the same function under another name."""

    def apply_weight(self, x: Tensor) -> Tensor:
        return self.weight * x

    def of_another_name(self, hidden_states: Tensor) -> Tensor:
        return self.apply_weight(
            hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, True) + self.variance_epsilon)
        )

    forward = of_another_name


class Handed(LlamaRMSNorm):
    """Hands itself on, to a function that asks for the same."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return LlamaRMSNorm.forward(self, hidden_states)


class ByValue(LlamaRMSNorm):
    """Does the same for all but numbers that were never tried."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return LlamaRMSNorm.forward(self, hidden_states) * (2 if hidden_states.abs().max() > 1e9 else 1)


class Asking(LlamaRMSNorm):
    """Asks whether it has something, and would do otherwise."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return LlamaRMSNorm.forward(self, hidden_states) * (1 if hasattr(self, "_buffers") else 2)


def test_a_norm_of_other_names_is_recognised_and_one_of_the_same_names_is_not() -> None:
    assert norm_kind(with_weight(ByName(WIDTH, eps=1e-6), WEIGHTS["usual"])) == (1e-6, 0.0)
    alike = type("LlamaRMSNorm", (LlamaRMSNorm,), {"forward": Half.forward, "__module__": LlamaRMSNorm.__module__})
    assert norm_kind(with_weight(alike(WIDTH, eps=1e-6), WEIGHTS["usual"])) is None


@pytest.mark.parametrize("kind", [Handed, ByValue, Asking])
def test_what_a_forward_does_with_its_module_is_watched(kind: Any) -> None:
    norm = with_weight(kind(WIDTH, eps=1e-6), WEIGHTS["usual"])
    assert norm_kind(norm) == ((1e-6, 0.0) if kind is Handed else None)


def test_what_is_asked_beside_the_parts() -> None:
    x, norm = torch.ones(1, WIDTH), with_weight(GemmaRMSNorm(WIDTH), WEIGHTS["usual"])
    assert outcome_over(norm, {"weight": norm.weight}, x, constants=True) is not None
    assert outcome_over(norm, {"weight": norm.weight}, x) is None  # its eps
    assert outcome_over(norm, {"weight": norm.weight, "eps": 1e-6}, x) is not None
    assert outcome_over(norm, {"weight": norm.weight, "eps": 1e-6, "more": 3}, x) is None  # left aside
    counting = with_weight(Counting(WIDTH), WEIGHTS["usual"])
    assert outcome_over(counting, {"weight": counting.weight}, x, constants=True) is None
    assert not hasattr(counting, "calls")
    assert takes_one_tensor(LlamaMLP)
    assert not takes_one_tensor(Optional)
