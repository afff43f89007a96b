"""What holds a decoder layer and its attention together: look-alikes are seen whatever their weights."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from entrenar.models.acceleration import attention
from entrenar.models.acceleration.agreement import recorded
from entrenar.models.acceleration.probes import (
    attention_structure,
    is_residual_layer,
    projects_its_input,
    rotates_halves,
)
from tests.support.families import make_family


def layer_of(family: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A decoder layer, and what it is called with beside its input."""
    model: Any = make_family(family, **changes)
    attention.register()
    model.set_attn_implementation(attention.NAME)
    layers = list(model.get_decoder().layers)
    _, _, kwargs, _ = recorded(model, layers)[-1]
    return layers[-1], kwargs


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3"])
def test_the_known_structure(family: str) -> None:
    changes = {"no_rope_layers": [1, 0]} if family == "smollm3" else {}
    layer, kwargs = layer_of(family, **changes)
    assert is_residual_layer(layer, kwargs)
    found = attention_structure(layer.self_attn, kwargs)
    assert found is not None
    assert found.scale == pytest.approx(32**-0.5)
    assert found.rotates == (family != "smollm3")


class ScaledResidual(LlamaDecoderLayer):
    """Of a multiplier that 2% would hide."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0] * 1.001
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Parallel(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


class PostNorm(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_states = hidden_states + self.input_layernorm(self.self_attn(hidden_states=hidden_states, **kwargs)[0])
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class ResidualDropout(LlamaDecoderLayer):
    """The known one but in training."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + torch.nn.functional.dropout(attended, 0.5, self.training)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class OtherMask(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        kwargs["position_ids"] = kwargs["position_ids"] + 1
        hidden_states = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize("kind", [ScaledResidual, Parallel, PostNorm, ResidualDropout, OtherMask])
def test_other_layers_are_seen(kind: type[Any]) -> None:
    layer, kwargs = layer_of("llama")
    layer.__class__ = kind
    assert not is_residual_layer(layer, kwargs)


def bent(change: str, wanted: str) -> Any:
    """The known attention's forward with a part of its source changed."""
    import inspect
    import textwrap

    source = textwrap.dedent(inspect.getsource(LlamaAttention.forward))
    assert source.count(change) == 1, change
    names = modeling_llama.__dict__
    local: dict[str, Any] = {}
    exec(source.replace(change, wanted), names, local)
    return local["forward"]


QUERY = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)\n"
COS = "cos, sin = position_embeddings\n"
ODD = {
    "clipped": (COS, COS.rstrip() + "; query_states = query_states.clamp(-8, 8)\n"),
    "scaled after the rotation": (QUERY, QUERY.rstrip() + "; query_states = query_states * 1.001\n"),
    "keys for values": ("        value_states,\n        attention_mask", "        key_states,\n        attention_mask"),
    "not rotated keys": (QUERY, "query_states, _ = apply_rotary_pos_emb(query_states, key_states, cos, sin)\n"),
    "other angles": (QUERY, QUERY.replace("cos, sin)", "sin, cos)")),
    "softcap": ("scaling=self.scaling,", "scaling=self.scaling, softcap=50.0,"),
    "sinks": ("scaling=self.scaling,", "scaling=self.scaling, s_aux=self.scaling,"),
    "no mask": ("        attention_mask,\n", "        None if attention_mask is None else ~attention_mask,\n"),
    "gated": ("attn_output = self.o_proj(attn_output)", "attn_output = self.o_proj(attn_output.sigmoid())"),
    "scaled output": ("attn_output = self.o_proj(attn_output)", "attn_output = self.o_proj(attn_output) * 0.5"),
}


@pytest.mark.parametrize("name", [name for name in ODD if name != "no mask"])
def test_other_attention_is_seen(name: str) -> None:
    layer, kwargs = layer_of("llama")
    layer.self_attn.__class__ = type("Odd", (LlamaAttention,), {"forward": bent(*ODD[name])})
    assert attention_structure(layer.self_attn, kwargs) is None


def test_a_mask_that_is_changed_on_the_way_is_seen() -> None:
    layer, kwargs = layer_of("llama")
    layer.self_attn.__class__ = type("Odd", (LlamaAttention,), {"forward": bent(*ODD["no mask"])})
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    assert attention_structure(layer.self_attn, kwargs | {"attention_mask": mask}) is None


def test_norms_behind_the_rotation_are_seen() -> None:
    layer, kwargs = layer_of("qwen3")

    class Late(Qwen3Attention):
        def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (
                each(hidden_states).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            out = attention.attention_forward(
                self, self.q_norm(q), self.k_norm(k), v, kwargs.get("attention_mask"), scaling=self.scaling
            )[0]
            return self.o_proj(out.flatten(2)), None

    assert attention_structure(layer.self_attn, kwargs) is not None
    layer.self_attn.__class__ = Late
    assert attention_structure(layer.self_attn, kwargs) is None


apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb


class OfAnother(LlamaAttention):
    """Whose keys are of another input."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.o_proj(self.q_proj(hidden_states)), self.k_proj(hidden_states * 1), self.v_proj(hidden_states)


def test_projections_of_another_input_are_seen() -> None:
    layer, kwargs = layer_of("llama")
    x = torch.randn(1, 4, 64)
    assert projects_its_input(layer.self_attn, (), kwargs | {"hidden_states": x})
    layer.self_attn.__class__ = OfAnother
    assert not projects_its_input(layer.self_attn, (x,), kwargs)


@pytest.mark.parametrize(
    ("family", "ours"),
    [("llama", True), ("qwen3", True), ("gemma3_text", True), ("phi3", True), ("cohere", False), ("glm", False),
     ("ernie4_5", False)],
)  # fmt: skip
def test_a_rotation_of_halves(family: str, ours: bool) -> None:
    from importlib import import_module

    folder = {"gemma3_text": "gemma3"}.get(family, family)
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    kind = next(v for k, v in vars(module).items() if k.endswith("Attention") and v.__module__ == module.__name__)
    model = type(
        "Made", (kind,), {"__init__": lambda self: torch.nn.Module.__init__(self), "__module__": kind.__module__}
    )()
    model.head_dim = 16
    assert rotates_halves(model, 8 if family in ("phi3", "glm") else 16) == ours
