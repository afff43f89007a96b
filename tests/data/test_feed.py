"""The probe's ids are the same in every file that a tokenizer is written to, so that only a real change is refused."""

from collections.abc import Callable

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from entrenar.data.feed import difference, feed_of
from entrenar.data.turn_end import template_of
from entrenar.exporting.gguf import vocabulary_metadata
from entrenar.gguf.tokenizer import tokenizer_from_metadata
from tests.support.gguf_tokenizers import TOKENIZERS


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_gguf_of_the_tokenizer_and_a_directory_make_the_same_ids(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    make: Callable[[], PreTrainedTokenizerFast] = TOKENIZERS[kind]
    ours = make()
    feed = feed_of(template_of(ours), is_chat=True)
    assert difference(feed, tokenizer_from_metadata(dict(vocabulary_metadata(ours, len(ours) + 3)), "x.gguf")) is None
    directory = tmp_path_factory.mktemp("tokenizer")
    ours.save_pretrained(directory)
    assert difference(feed, AutoTokenizer.from_pretrained(directory)) is None


def test_kinds_of_split_are_told_apart() -> None:
    feed = feed_of(template_of(TOKENIZERS["qwen2"]()), is_chat=True)
    others = [kind for kind in ("gpt-2", "smollm", "llama-bpe", "tekken", "gpt-4o") if kind in TOKENIZERS]
    assert all(difference(feed, TOKENIZERS[kind]()) for kind in others)
