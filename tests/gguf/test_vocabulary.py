"""Tokenizers to GGUF metadata and back: the same ids for random Unicode, and the same chat."""

import random
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from entrenar.exporting.gguf import vocabulary_metadata
from entrenar.gguf.tokenizer import tokenizer_from_metadata
from tests.support.gguf_tokenizers import TOKENIZERS, random_text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_are_the_same_there_and_back(kind: str) -> None:
    make: Callable[[], PreTrainedTokenizerFast] = TOKENIZERS[kind]
    ours = make()
    back = tokenizer_from_metadata(metadata_of(ours), "x.gguf")
    source = random.Random(0)
    texts = [random_text(source) for _ in range(2000)]
    if kind == "llama 2 in transformers 5":  # it alone puts no space before one that follows a special token
        texts = [re.sub("(?<=>) +", "", text) for text in texts]
    if kind == "qwen2":  # it alone composes characters, which llama.cpp does not with any file
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    for text, expected, found in zip(texts, ours(texts)["input_ids"], back(texts)["input_ids"], strict=True):  # pyright: ignore
        assert found == expected, text
    assert back.special_tokens_map == ours.special_tokens_map


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_chat_is_the_same_there_and_back(kind: str) -> None:
    ours = TOKENIZERS[kind]()
    back = tokenizer_from_metadata(metadata_of(ours), "x.gguf")
    chat = [{"role": "user", "content": "Is it 7:30?"}, {"role": "assistant", "content": "It is."}]
    assert back.apply_chat_template(chat)["input_ids"] == ours.apply_chat_template(chat)["input_ids"]  # pyright: ignore


def metadata_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The keys of a GGUF of it, of three rows more than it has tokens."""
    return dict(vocabulary_metadata(tokenizer, len(tokenizer) + 3))
