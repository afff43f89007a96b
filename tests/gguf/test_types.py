"""llama.cpp's mixtures as its documentation and sources state them; tests/interop compares with the program itself."""

import pytest

from entrenar.gguf.types import FILE_TYPES, Model, type_of

LLAMA_8B = Model(layers=32, heads=32, kv_heads=8, tied=False)
MORE_BITS = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}


def chosen(name: str, type: str, columns: int = 4096, model: Model = LLAMA_8B) -> str:
    return type_of(name, (1024, columns), FILE_TYPES[type], model)


@pytest.mark.parametrize(("type", "most"), [("q4_k_m", "q4_k"), ("q5_k_m", "q5_k")])
def test_the_medium_mixtures_give_values_and_down_projections_more_bits(type: str, most: str) -> None:
    for part in ("attn_v", "ffn_down"):
        six = {layer for layer in range(32) if chosen(f"blk.{layer}.{part}.weight", type) == "q6_k"}
        assert six == MORE_BITS
        assert chosen(f"blk.4.{part}.weight", type) == most
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert chosen(f"blk.0.{part}.weight", type) == most
    assert chosen("output.weight", type) == "q6_k"
    assert chosen("token_embd.weight", type) == most


def test_the_small_mixture_gives_the_first_layers_more_bits() -> None:
    assert [chosen(f"blk.{n}.attn_v.weight", "q4_k_s") for n in (0, 3, 4)] == ["q5_k", "q5_k", "q4_k"]
    assert [chosen(f"blk.{n}.ffn_down.weight", "q4_k_s") for n in (0, 3, 4)] == ["q5_k", "q5_k", "q4_k"]


def test_a_tied_embedding_is_held_as_the_head_it_is() -> None:
    tied = Model(layers=32, heads=32, kv_heads=8, tied=True)
    assert chosen("token_embd.weight", "q4_k_m", model=tied) == "q6_k"
    assert chosen("token_embd.weight", "q4_0", model=tied) == "q6_k"
    assert chosen("token_embd.weight", "q8_0", model=tied) == "q8_0"
    assert chosen("token_embd.weight", "q4_k_m", 576, tied) == "q8_0"


@pytest.mark.parametrize(
    ("type", "columns", "fallback"),
    [
        ("q4_k_m", 576, "q5_0"), ("q5_k_s", 576, "q5_1"), ("q6_k", 576, "q8_0"), ("q4_k_m", 580, "f16"),
        ("q4_0", 580, "f16"), ("q8_0", 20, "f16"), ("q4_0", 576, "q4_0"), ("f16", 20, "f16"), ("f32", 576, "f32"),
    ],
)  # fmt: skip
def test_rows_that_are_not_whole_blocks_get_the_next_larger_type(type: str, columns: int, fallback: str) -> None:
    assert chosen("blk.5.attn_q.weight", type, columns) == fallback


@pytest.mark.parametrize("type", FILE_TYPES)
def test_vectors_stay_float32(type: str) -> None:
    assert type_of("blk.0.attn_norm.weight", (4096,), FILE_TYPES[type], LLAMA_8B) == "f32"


def test_values_shared_by_eight_heads_in_eighty_layers_get_more_bits() -> None:
    model = Model(layers=80, heads=64, kv_heads=8, tied=False)
    assert chosen("blk.11.attn_v.weight", "q4_k_m", model=model) == "q5_k"
    assert chosen("blk.11.attn_v.weight", "q4_k_m", model=Model(80, 64, 64, False)) == "q4_k"
