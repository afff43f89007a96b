"""Special tokens and ends of a turn: what llama.cpp's vocabulary loader makes of a file. (tests/interop asks it.)"""

from typing import Any

import pytest

from entrenar.core.errors import InputError
from entrenar.gguf.special_tokens import CONTROL, NORMAL, USER_DEFINED, special_tokens

_PLAIN = [*"abcdefghijklmnop"]  # 16: token 11 is `l`


def _metadata(*added: str, kind: str = "gpt2", ids: dict[str, int] | None = None) -> dict[str, Any]:
    named = {f"tokenizer.ggml.{name}_token_id": index for name, index in (ids or {}).items()}
    return {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": [*_PLAIN, *added]} | named


def _ends(metadata: dict[str, Any]) -> list[str]:
    special = special_tokens(metadata, "x.gguf")
    return [special.texts[end] for end in special.ends]


@pytest.mark.parametrize(("added", "ids", "expected"), [
    (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], {"eos": 16}, ["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]),
    (["<eos>", "<end_of_turn>", "<start_of_turn>"], {"eos": 16}, ["<eos>", "<end_of_turn>"]),
    (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], {"eos": 17}, ["<|im_end|>", "<|endoftext|>"]),
    (["<stop>", "<turn>"], {"eos": 16, "eot": 17}, ["<stop>", "<turn>"]),
    (["<stop>", "<turn>", "<tool>"], {"eos": 16, "eot": 17, "eom": 18}, ["<stop>", "<turn>", "<tool>"]),
    (["<stop>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>"], {"eos": 16},
     ["<stop>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]),
    (["<|return|>", "<|call|>", "<|end|>"], {"eos": 16}, ["<|return|>", "<|call|>"]),
    (["<eos>", "<|tool_response>", "</s>"], {"eos": 16}, ["<eos>", "<|tool_response>"]),
    (["<stop>"], {}, ["l"]), (["<stop>"], {"eos": 2**32 - 1}, ["l"]), (["<stop>"], {"eos": -1}, ["l"]),
], ids=["llama 3", "gemma", "qwen", "eot", "eom", "fim", "gpt-oss", "gemma 4", "none", "beyond", "-1"])  # fmt: skip
def test_ends_are_those_of_llama_cpp(added: list[str], ids: dict[str, int], expected: list[str]) -> None:
    """A byte-level file that names no eos has token 11 there: Falcon's, once."""
    assert _ends(_metadata(*added, ids=ids)) == expected


def test_what_looks_like_an_end_is_a_control_token_whatever_its_type() -> None:
    metadata = _metadata("<|eot_id|>", "<|fim_middle|>", "<|channel|>", "plain", ids={"eos": 0})
    metadata["tokenizer.ggml.token_type"] = [NORMAL] * 18 + [CONTROL, NORMAL]
    special = special_tokens(metadata, "x.gguf")
    assert special.types[16:] == [CONTROL, CONTROL, USER_DEFINED, NORMAL]
    assert special.types[0] == NORMAL  # eos by its id alone is cut out of no text


def test_a_sentencepiece_file_that_names_nothing_has_llama_2s_ids() -> None:
    assert special_tokens(_metadata(kind="llama"), "x.gguf").ids == {"bos": 1, "eos": 2, "unknown": 0}


def test_tokens_without_text_are_told_apart() -> None:
    texts = special_tokens(_metadata("", "x", ""), "x.gguf").texts
    assert texts[16:] == ["[EMPTY_16]", "x", "[EMPTY_18]"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, "has the token 'a' twice, as 0 and 2"),
    ({"tokenizer.ggml.tokens": None}, "has no tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.tokens": []}, "has no tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.tokens": [1, 2]}, "has no tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.token_type": [1] * 15}, "token_type for 15 of its 16 tokens"),
    ({"tokenizer.ggml.token_type": [1.0] * 16}, "token_type for 16 of its 16 tokens"),
    ({"tokenizer.ggml.token_type": 1}, "token_type for 0 of its 16 tokens"),
])  # fmt: skip
def test_a_vocabulary_that_contradicts_itself_is_an_input_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        special_tokens(_metadata() | changes, "x.gguf")


def test_more_types_than_tokens_are_left_over() -> None:
    types = special_tokens(_metadata() | {"tokenizer.ggml.token_type": [NORMAL] * 99}, "x.gguf").types
    assert types == [NORMAL] * 16
