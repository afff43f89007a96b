"""Families in GGUF: names, hyper-parameters, row order and rotary factors, against gguf and transformers."""

from copy import deepcopy
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from entrenar.core.errors import InputError
from entrenar.gguf.config import check_exportable, config_from_metadata, metadata_from_config
from entrenar.gguf.families import FAMILIES, family_in, family_of
from entrenar.gguf.rope import head_dim, rope_tensors

_SIZES: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
}  # fmt: skip


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**deepcopy(_SIZES | changes))


_CONFIG = _llama()


def _parameter_names(config: PretrainedConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]


def _hollow(model_type: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **deepcopy(_SIZES | changes))


_LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 200000.0, "factor": 8.0},
}
_CONFIGS = {
    "llama": _llama(attention_bias=True, mlp_bias=True),
    "mistral": _hollow("mistral", sliding_window=None),
    "qwen2": _hollow("qwen2"),
    "qwen3": _hollow("qwen3", head_dim=12, attention_bias=True),
    "phi3": _hollow("phi3", sliding_window=100, original_max_position_embeddings=64),
    "smollm3": _hollow("smollm3", num_hidden_layers=5),
    "gemma2": _hollow("gemma2", head_dim=12, query_pre_attn_scalar=12, final_logit_softcapping=20.0),
    "gemma3_text": _hollow(
        "gemma3_text", head_dim=12, query_pre_attn_scalar=12, num_hidden_layers=7, rope_parameters=_LOCAL_AND_GLOBAL
    ),
}


@pytest.mark.parametrize("name", _CONFIGS)
def test_names_are_those_of_the_gguf_package_both_ways(name: str) -> None:
    config = _CONFIGS[name]
    family = family_of(config)
    architectures = {known: number for number, known in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(architectures[family.architecture], 12)
    names = _parameter_names(config)
    expected = [table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names]
    assert [family.gguf_name(name) for name in names] == expected
    assert [family.hf_name(str(name)) for name in expected] == names


def test_every_row_is_tried_here() -> None:
    assert {family_of(config).architecture for config in _CONFIGS.values()} == FAMILIES.keys()
    assert _CONFIGS.keys() == {model_type for row in FAMILIES.values() for model_type in row.model_types}


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj.weight", "model.layers.x.mlp.up_proj.weight",
    "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.self_attn.q_norm.weight", "", "weight",
])  # fmt: skip
def test_a_parameter_the_family_does_not_have_has_no_name(name: str) -> None:
    assert FAMILIES["llama"].gguf_name(name) is None


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.ffn_gate_exps.weight", "blk.0.attn_q", "blk.a.attn_q.bias"]
)
def test_a_tensor_the_family_does_not_have_has_no_name(name: str) -> None:
    assert FAMILIES["llama"].hf_name(name) is None


_HEADS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6))  # key heads, queries a key, half a head


@given(sizes=_HEADS, tail=st.sampled_from([(), (1,), (5,)]), seed=st.integers(0, 99))
def test_row_order_goes_there_and_back(sizes: tuple[int, int, int], tail: tuple[int, ...], seed: int) -> None:
    """Weights and biases, of queries and of the fewer keys."""
    keys, group, half = sizes
    family = FAMILIES["llama"]
    config = LlamaConfig(
        num_attention_heads=keys * group, num_key_value_heads=keys, head_dim=2 * half, hidden_size=keys * group * 4
    )
    for part, heads in (("q_proj", keys * group), ("k_proj", keys)):
        name = f"model.layers.0.self_attn.{part}.weight"
        tensor = torch.randn(heads * 2 * half, *tail, generator=torch.Generator().manual_seed(seed))
        there = family.to_gguf(name, tensor, config)
        assert torch.equal(family.in_our_order(there, config), tensor)
        # convert_hf_to_gguf.py, LlamaModel.permute:
        array = tensor.numpy().reshape(heads, 2, half, *tail).swapaxes(1, 2).reshape(tensor.shape)
        assert torch.equal(there, torch.from_numpy(array.copy()))


def test_neighbouring_pairs_rotated_as_llama_cpp_does_are_halves_rotated_as_transformers_does() -> None:
    """The scores of a query and a key are the same in both worlds; so the row order means what it must."""
    torch.manual_seed(0)
    heads, keys, dim, positions = 6, 2, 8, torch.arange(5)
    cos, sin = LlamaRotaryEmbedding(_CONFIG)(torch.zeros(1), positions[None])
    x = torch.randn(5, 48)
    queries, later = {}, {}
    for part, count in (("q_proj", heads), ("k_proj", keys)):
        weight = torch.randn(count * dim, 48)
        permuted = FAMILIES["llama"].to_gguf(f"model.layers.0.self_attn.{part}.weight", weight, _CONFIG)
        queries[part] = (x @ weight.T).view(5, count, dim).transpose(0, 1)[None]
        later[part] = _rotate_pairs((x @ permuted.T).view(5, count, dim), positions)
    q, k = apply_rotary_pos_emb(queries["q_proj"], queries["k_proj"], cos, sin)
    ours = torch.einsum("thd,sd->hts", later["q_proj"], later["k_proj"][:, 0])
    theirs = torch.einsum("htd,sd->hts", q[0], k[0, 0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def _rotate_pairs(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """ggml's rope of mode 0: elements 2i and 2i+1 of (T, heads, dim) turned by position·θ^(−2i/dim)."""
    dim = x.shape[-1]
    angles = positions[:, None] / _SIZES["rope_parameters"]["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    turned = torch.view_as_complex(x.view(*x.shape[:-1], dim // 2, 2)) * torch.exp(1j * angles)[:, None]
    return torch.view_as_real(turned).reshape(x.shape)


@pytest.mark.parametrize(("name", "part"), [
    ("llama", "v_proj"), ("llama", "o_proj"), *((name, "q_proj") for name in _CONFIGS if "qwen" in name),
])  # fmt: skip
def test_other_rows_stay_where_they_are(name: str, part: str) -> None:
    """Values everywhere; and queries where llama.cpp rotates halves, as transformers does."""
    tensor, parameter = torch.randn(48, 48), f"model.layers.0.self_attn.{part}.weight"
    family = family_of(_CONFIGS[name])
    assert not family.reorders(parameter)
    assert torch.equal(family.to_gguf(parameter, tensor, _CONFIGS[name]), tensor)


@given(
    theta=st.floats(1e3, 1e6), factor=st.floats(1.5, 40), low=st.floats(0.5, 2), more=st.floats(0.5, 8),
    context=st.sampled_from([64, 1024, 8192]), head_dim=st.sampled_from([8, 64, 128]),
)  # fmt: skip
def test_rotary_factors_turn_default_frequencies_into_transformers_llama3_ones(
    theta: float, factor: float, low: float, more: float, context: int, head_dim: int
) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
        "high_freq_factor": low + more, "original_max_position_embeddings": context,
    }  # fmt: skip
    config = _llama(rope_parameters=rope, head_dim=head_dim, max_position_embeddings=2**17)
    expected, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    factors = rope_tensors(config)["rope_freqs.weight"]
    assert factors.shape == (head_dim // 2,)
    assert attention == 1.0
    torch.testing.assert_close(plain / factors, expected, rtol=1e-4, atol=0)


def test_plain_rotary_embeddings_have_no_factors() -> None:
    assert rope_tensors(_CONFIG) == {}


_NOT_IN_A_FILE = {"architectures", "attention_bias", "mlp_bias", "transformers_version", "dtype"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [name for name in _CONFIGS if name != "mistral"])
def test_a_config_survives_gguf_metadata(name: str, tied: bool) -> None:
    config = _CONFIGS[name]
    tokens = {f"tokenizer.ggml.{token}_token_id": value for token, value in (("bos", 1), ("eos", 2), ("padding", 2))}
    metadata = {"general.architecture": family_of(config).architecture, **metadata_from_config(config), **tokens}
    back = config_from_metadata(metadata, "x.gguf", 90, tied, rope_tensors(config)).to_dict()
    expected = config.to_dict() | {"tie_word_embeddings": tied}
    kept = expected.keys() - _NOT_IN_A_FILE
    assert {key: back.get(key) for key in kept} == {key: expected[key] for key in kept}


@pytest.mark.parametrize("name", _CONFIGS)
def test_metadata_keys_are_the_gguf_packages(name: str) -> None:
    known = {value for key, value in vars(gguf.Keys.LLM).items() if key.isupper()}
    known |= {value for group in (gguf.Keys.Attention, gguf.Keys.Rope) for value in vars(group).values()}
    keys = metadata_from_config(_CONFIGS[name])
    assert {key.replace(f"{family_of(_CONFIGS[name]).architecture}.", "{arch}.", 1) for key in keys} <= known


def test_what_is_optional_in_metadata_has_llama_cpps_defaults() -> None:
    """As many key heads as heads, heads that share the width evenly, θ = 10000."""
    metadata = metadata_from_config(_CONFIG)
    for key in ("attention.head_count_kv", "attention.key_length", "rope.freq_base"):
        del metadata[f"llama.{key}"]
    config = config_from_metadata(metadata | {"general.architecture": "llama"}, "x.gguf", 90, tied=True)
    assert (config.to_dict()["num_key_value_heads"], head_dim(config)) == (6, 8)
    assert config.to_dict()["rope_parameters"]["rope_theta"] == 10000.0


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.layer_norm_rms_epsilon"])
@pytest.mark.parametrize("name", _CONFIGS)
def test_a_missing_key_is_named(name: str, key: str) -> None:
    metadata, architecture = metadata_from_config(_CONFIGS[name]), family_of(_CONFIGS[name]).architecture
    del metadata[f"{architecture}.{key}"]
    with pytest.raises(InputError, match=rf"x\.gguf lacks the key {architecture}\.{key}"):
        config_from_metadata(metadata | {"general.architecture": architecture}, "x.gguf", 90, tied=True)


@pytest.mark.parametrize("architecture", ["falcon", None])
def test_another_architecture_is_an_error_that_lists_the_known(architecture: str | None) -> None:
    with pytest.raises(InputError, match=f"architecture '?{architecture}'?: .* reads {', '.join(FAMILIES)}"):
        family_in({"general.architecture": architecture}, "x.gguf")


@pytest.mark.parametrize("name", _CONFIGS)
def test_what_a_family_has_can_be_exported(name: str) -> None:
    check_exportable(_CONFIGS[name])


_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
_DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("config", [
    _llama(rope_parameters=_LLAMA3_ROPE), _hollow("mistral", sliding_window=128),
    _hollow("qwen2", use_sliding_window=False, sliding_window=5),
    _llama(rope_parameters=_LINEAR_ROPE), _hollow("qwen2", rope_parameters=_YARN), _llama(rope_parameters=_YARN),
    _hollow("qwen3", head_dim=12, rope_parameters=_YARN | {"attention_factor": 1.5}),
    _llama(rope_parameters=_YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}),
], ids=["llama3 rotary", "a window as long as the context", "a window that is not used", "linear", "yarn",
    "yarn of llama", "yarn's factor of scores", "yarn of deepseek"])  # fmt: skip
def test_what_makes_no_difference_can_be_exported(config: PretrainedConfig) -> None:
    check_exportable(config)


_REFUSED = {
    "falcon": (_hollow("falcon"), "'falcon' is not in this version: it writes llama, mistral, qwen2"),
    "dynamic rotary": (_llama(rope_parameters=_DYNAMIC_ROPE), "rope type 'dynamic' .* llama it writes default, llama3"),
    "linear rotary": (_hollow("gemma2", rope_parameters=_LINEAR_ROPE), "rope type 'linear' .* gemma2 it writes def"),
    "yarn's bounds": (_llama(rope_parameters=_YARN | {"beta_fast": 16.0}), "rope_parameters = .*'beta_fast': 16"),
    "yarn without rounding": (_llama(rope_parameters=_YARN | {"truncate": False}), "rope_parameters = .*'truncate'"),
    "llama3 rotary": (_hollow("qwen2", rope_parameters=_LLAMA3_ROPE), "rope type 'llama3' .* qwen2 it writes default"),
    "sliding window": (_hollow("mistral", sliding_window=32), "sliding_window = 32 .* with None"),
    "sliding layers": (
        _hollow("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1), "layer_types = .*sliding",
    ),
    "layers that do not rotate": (_hollow("smollm3", no_rope_layer_interval=2), "no_rope_layers = .1, 0, 1. .*1, 1, 1"),
    "scale of scores": (
        _hollow("gemma2", head_dim=12, query_pre_attn_scalar=8), "query_pre_attn_scalar = 8 .* with 12",
    ),
    "another pattern of layers": (
        _hollow("gemma3_text", head_dim=12, query_pre_attn_scalar=12, num_hidden_layers=7, sliding_window_pattern=4,
                rope_parameters=_LOCAL_AND_GLOBAL), "layer_types = .* in its architecture gemma3",
    ),
    "no cap": (
        _hollow("gemma2", head_dim=12, query_pre_attn_scalar=12, attn_logit_softcapping=None),
        "attn_logit_softcapping = None .* with 50",
    ),
    "head size": (_hollow("qwen2", head_dim=12), "head_dim = 12 .* with 8"),
    "activation": (_llama(hidden_act="gelu"), "hidden_act = gelu .* with silu"),
}  # fmt: skip


@pytest.mark.parametrize("case", _REFUSED)
def test_what_would_be_exported_wrongly_is_refused(case: str) -> None:
    config, message = _REFUSED[case]
    with pytest.raises(InputError, match=message):
        check_exportable(config)


def _read(name: str, changes: dict[str, Any]) -> PretrainedConfig:
    """The config of a file of that family, with keys changed, or left out where None."""
    architecture = family_of(_CONFIGS[name]).architecture
    metadata = metadata_from_config(_CONFIGS[name]) | {f"{architecture}.{key}": changes[key] for key in changes}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return config_from_metadata(metadata | {"general.architecture": architecture}, "x.gguf", 90, tied=True)


@pytest.mark.parametrize(("name", "changes"), [
    ("gemma2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}), ("phi3", {"rope.scaling.factor": 2.0}),
    ("gemma2", {"rope.scale_linear": 2.0}), ("qwen2", {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}),
], ids=["yarn", "linear by default", "linear of old", "longrope"])  # fmt: skip
def test_frequencies_scaled_otherwise_are_an_error(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"x\.gguf scales its rotary frequencies \(\w+ by [24].* does not read in"):
        _read(name, changes)


@pytest.mark.parametrize(("changes", "expected"), [
    ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.138629}),
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64,
      "rope.scaling.attn_factor": 0.5}, {"original_max_position_embeddings": 64, "attention_factor": 0.569315}),
], ids=["linear by default", "linear of old", "yarn", "yarn with all its keys"])  # fmt: skip
def test_frequencies_scaled_by_keys_are_read(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    rope = _read("qwen2", changes).to_dict()["rope_parameters"]
    for key, value in expected.items():
        assert rope[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6))


_NOT_READ = {
    "attention.causal": False, "rope.scaling.attn_factor": 2.0, "nextn_predict_layers": 1,
    "attention.value_length": 4, "expert_count": 4, "expert_used_count": [2, 0, 0],
}  # fmt: skip


@pytest.mark.parametrize("key", _NOT_READ)
@pytest.mark.parametrize("name", _CONFIGS)
def test_a_key_by_which_llama_cpp_computes_something_else_is_an_error(name: str, key: str) -> None:
    with pytest.raises(InputError, match=key.replace("value_length", "key_length")):
        _read(name, {key: _NOT_READ[key]})


@pytest.mark.parametrize(("name", "key", "value"), [
    *((name, "rope.dimension_count", 4) for name in ("llama", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")),
    *((name, "rope.dimension_count_swa", 4) for name in ("gemma2", "gemma3_text")),
    *((name, "attention.key_length_swa", 4) for name in ("gemma2", "gemma3_text")),
    ("gemma2", "rope.freq_base_swa", 5000.0), ("qwen2", "attention.key_length", 12),
    ("phi3", "attention.key_length", 12),
])  # fmt: skip
def test_a_key_that_one_family_does_not_compute_with_is_an_error(name: str, key: str, value: float) -> None:
    changes = {key: value} | ({"attention.value_length": value} if key == "attention.key_length" else {})
    with pytest.raises(InputError, match=rf"the key \w+\.{key} is {value}, and this version computes \w+ only with"):
        _read(name, changes)


@pytest.mark.parametrize(("key", "value"), [
    ("block_count", 2**31), ("block_count", 0), ("block_count", 513), ("block_count", 3.0), ("block_count", True),
    ("attention.head_count", 0), ("attention.head_count", "8"), ("embedding_length", -48), ("context_length", []),
    ("attention.layer_norm_rms_epsilon", float("nan")), ("attention.layer_norm_rms_epsilon", 0.0),
    ("rope.freq_base", float("inf")), ("rope.freq_base", -1.0), ("rope.scaling.factor", -2.0),
    ("rope.scaling.type", "dynamic"), ("rope.scaling.type", 1), ("rope.scaling.factor", "2"),
    ("attention.head_count_kv", [2, 2]), ("attention.head_count_kv", [2, 1, 2]), ("feed_forward_length", []),
    ("rope.dimension_count", 3), ("attention.head_count_kv", ["a", 2, 2]), ("attention.head_count_kv", [[2]] * 3),
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "smollm3", "gemma3_text"])
def test_a_value_that_nothing_can_be_computed_with_is_an_error(name: str, key: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"x\.gguf.*({key}|layers)"):
        _read(name, {key: value})


def test_one_number_for_every_layer_is_that_number() -> None:
    """As OpenELM's and Llama-Nemotron's files have them; llama.cpp takes both ways."""
    changes = {"attention.head_count": [6] * 3, "attention.head_count_kv": [2] * 3, "feed_forward_length": [80] * 3}
    assert _read("llama", changes).to_dict() == _read("llama", {}).to_dict()
    with pytest.raises(InputError, match=r"llama\.attention\.head_count_kv differs from layer to layer \(1 to 2\)"):
        _read("llama", changes | {"attention.head_count_kv": [2, 1, 2]})


def test_without_a_window_every_layer_of_gemma_3_attends_to_everything() -> None:
    for window in (None, 0):
        config = _read("gemma3_text", {"attention.sliding_window": window}).to_dict()
        assert set(config["layer_types"]) == {"full_attention"}


@pytest.mark.parametrize("index", [-1, 90, 2**32 - 1, "2", None, True])
def test_a_padding_id_that_is_no_token_is_none(index: object) -> None:
    metadata = metadata_from_config(_CONFIG) | {
        "general.architecture": "llama", "tokenizer.ggml.padding_token_id": index,
    }  # fmt: skip
    assert config_from_metadata(metadata, "x.gguf", 90, tied=True).pad_token_id is None


@pytest.mark.parametrize("changes", [
    {"rope.scaling.type": "none"}, {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
    {"rope.scaling.factor": 0.0},
], ids=["none", "by one", "zero"])  # fmt: skip
def test_a_scaling_that_does_nothing_is_none(changes: dict[str, Any]) -> None:
    metadata = metadata_from_config(_CONFIGS["qwen2"]) | {f"qwen2.{key}": value for key, value in changes.items()}
    config = config_from_metadata(metadata | {"general.architecture": "qwen2"}, "x.gguf", 90, tied=True)
    assert config.to_dict()["rope_parameters"]["rope_type"] == "default"


@pytest.mark.parametrize(("pattern", "expected"), [
    (None, "sssssfs"), (3, "ssfssfs"), ([True, False, True, False, True, False, True], "sfsfsfs"),
])  # fmt: skip
def test_a_file_may_say_which_layers_slide(pattern: int | list[bool] | None, expected: str) -> None:
    metadata = metadata_from_config(_CONFIGS["gemma3_text"]) | {"general.architecture": "gemma3"}
    said = {} if pattern is None else {"gemma3.attention.sliding_window_pattern": pattern}
    config = config_from_metadata(metadata | said, "x.gguf", 90, tied=True)
    assert "".join(layer[0] for layer in config.to_dict()["layer_types"]) == expected


def test_longrope_under_its_old_name_can_be_exported() -> None:
    """As Phi-3's config.json has it, with a factor that follows from the contexts."""
    rope = {"type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    check_exportable(_hollow("phi3", rope_parameters=None, rope_scaling=rope, original_max_position_embeddings=64))
