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
from entrenar.models.acceleration.attention_structure import attention_structure, projections_of_input
from entrenar.models.acceleration.fast_forwards import use_fast_forwards
from entrenar.models.acceleration.layer_structure import is_residual_layer
from entrenar.models.acceleration.other_globals import with_globals
from entrenar.models.acceleration.rotation import RotationSpy, rotate_both, rotates_halves, rotating_by
from entrenar.models.acceleration.swapped import fast_forward_of
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
    assert (found.rotation is not None) == (family != "smollm3")


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
    assert projections_of_input(layer.self_attn, (), kwargs | {"hidden_states": x})
    layer.self_attn.__class__ = OfAnother
    assert projections_of_input(layer.self_attn, (x,), kwargs) is None


@pytest.mark.parametrize(
    ("family", "ours"),
    [("llama", True), ("qwen3", True), ("gemma3_text", True), ("phi3", True), ("cohere", False), ("glm", False),
     ("ernie4_5", False)],
)  # fmt: skip
def test_a_rotation_of_halves(family: str, ours: bool) -> None:
    from importlib import import_module

    folder = {"gemma3_text": "gemma3"}.get(family, family)
    module = import_module(f"transformers.models.{folder}.modeling_{folder}")
    rotate = module.apply_rotary_pos_emb
    assert rotates_halves(rotate, 16, 8 if family in ("phi3", "glm") else 16) == ours


def renamed(forward: Any, rotate: Any) -> Any:
    """Llama's forward in a module of its own, in which the rotation has another name."""
    import inspect
    import textwrap

    source = textwrap.dedent(inspect.getsource(forward)).replace("apply_rotary_pos_emb", "spin")
    names = {name: value for name, value in vars(modeling_llama).items() if name != "apply_rotary_pos_emb"}
    local: dict[str, Any] = {}
    exec(source, names | {"spin": rotate}, local)
    return local["forward"]


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of neighbours in place of halves."""

    def one(x: Tensor) -> Tensor:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos[:, None] + turned * sin[:, None]

    return one(q), one(k)


@pytest.mark.usefixtures("native_path")
def test_a_rotation_is_known_by_what_it_does_not_by_its_name() -> None:
    counts = []
    for forward in (
        LlamaAttention.forward,
        renamed(LlamaAttention.forward, modeling_llama.apply_rotary_pos_emb),
        renamed(LlamaAttention.forward, interleaved),
        with_globals(LlamaAttention.forward, {"apply_rotary_pos_emb": interleaved}),  # pyright: ignore[reportArgumentType]
    ):
        model: Any = make_family("llama", torch.bfloat16).requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.__class__ = type("Other", (LlamaAttention,), {"forward": forward})
        use_fast_forwards(model)
        module = model.model.layers[0].self_attn
        attends: Any = fast_forward_of(module)
        counts.append((fast_forward_of(model.model.layers[0]) is not None, attends.forward is not forward))
    assert counts == [(True, True), (True, True), (False, False), (False, False)]


def test_the_rotation_that_a_forward_calls() -> None:
    cos, sin = torch.rand(1, 4, 8), torch.rand(1, 4, 8)
    spy = RotationSpy(attend, (cos, sin))
    q, k = torch.rand(1, 2, 4, 8), torch.rand(1, 1, 4, 8)
    assert spy.forward(q, k, cos, sin)[0] is q
    assert spy.rotation is not None
    assert spy.rotation.rotate is rotation_of_nothing
    changed = rotating_by(attend, spy.rotation, rotate_both)
    torch.testing.assert_close(changed(q, k, cos, sin), rotate_both(q, k, cos, sin))
    assert attend(q, k, cos, sin)[0] is q  # the module's own is as it was
    spy.forward(q, k, cos, sin)
    assert spy.rotation is None  # twice
    other = RotationSpy(attend, (cos, sin))
    other.forward(q, k, cos.clone(), sin)
    assert other.rotation is None
    assert rotating_by(attend, None, rotate_both) is attend


def rotation_of_nothing(q: Tensor, k: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def attend(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotation_of_nothing(q, k, cos, sin)
