"""llama.cpp on the same vocabularies: where text is cut under every name we read, which tokens are special, what ends.

The vocabulary is merged over texts that were cut nowhere, so that a cut in another place shows in the tokens.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from gguf import GGUFWriter
from llama_cpp import Llama
from tokenizers import Tokenizer
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from entrenar.gguf.pre_tokenizers import _ALIASES, PRE_TOKENIZERS
from entrenar.gguf.special_tokens import special_tokens
from entrenar.gguf.tokenizer import tokenizer_from_metadata

pytestmark = pytest.mark.interop

_VISIBLE = """
Hello WORLD camelCase XMLHttp don't DON'T I'M they'LL we'Ve 's 'S 'tis O'Re 'd 1 12 123 1234 12345 3.14 x=y_1 a.b.c
٣٤٥ ½ ²³ Ⅳ ① १२३ 日本語 漢字 かな カタカナ 한국어 ไทย हिन्दी বাংলা العربية עברית é ÉCOLE École ÄÖÜß ñandú ǅ ʰ ª
ΑΒΓ αβγ Привет МИР ! ? ... … — « » “q” (x) [y] $ + <= ^ ` | ~ # @ % & * / // \\ _ __ -- == : ; " ' ’s € ± × → ≠ ™
🙂 👩‍👩‍👧 🇪🇺 👍🏽 foo_bar <tag> ?/
"""
_BLANKS = (
    " ,  ,   ,\n,\n\n,\r\n,\r,\t,\t\t, \n,\n , \t ,\u00a0,\u3000,\u2009,\u0085, 's, 1, 12, é, (a), !,!\n,!!\n\n,/\n"
)
_MARKS = (
    "e\u0301 n\u0303 a\u0308\u0323 \u0301 \ufe0f \ufeff \u00ad \u200b \u200d \U0001d54f \U00020000 \ue000 \x00 \x7f"
)
_PIECES = [*_VISIBLE.split(), *_BLANKS.split(","), *_MARKS.split(" "), " ,"]


def _texts(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices(_PIECES, k=source.randrange(1, 10))) for _ in range(count)]


@pytest.fixture(scope="module")
def merged() -> dict[str, Any]:
    """Tokens and merges; the last token is a bos."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(_texts(3000, 1), trainer)
    vocabulary = trained.get_vocab()
    tokens = [*sorted(vocabulary, key=lambda token: vocabulary[token]), "<bos>"]
    merges = json.loads(trained.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1, "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }  # fmt: skip


@contextmanager
def _llama_cpp(metadata: dict[str, Any], path: Path) -> Iterator[Llama]:
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = Llama(str(path), vocab_only=True, verbose=False)
    try:
        yield model
    finally:
        model.close()


@pytest.mark.parametrize("name", [None, *PRE_TOKENIZERS, *_ALIASES])
def test_text_is_cut_where_llama_cpp_cuts_it(merged: dict[str, Any], name: str | None, tmp_path: Path) -> None:
    metadata = merged | ({"tokenizer.ggml.pre": name} if name else {})
    ours = tokenizer_from_metadata(metadata, "x.gguf")
    with _llama_cpp(metadata, tmp_path / "v.gguf") as theirs:
        for text in _texts(300, 7):
            assert ours(text)["input_ids"] == theirs.tokenize(text.encode(), add_bos=True, special=True), text


_WORDS = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "<pre>"]
_VOCABULARIES: dict[str, tuple[list[str], dict[str, int]]] = {
    "llama 3": (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>"], {"eos": 28}),
    "gemma": (["<eos>", "<end_of_turn>", "<start_of_turn>"], {"eos": 28}),
    "qwen": (["<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], {"eos": 29}),
    "eot and eom by id": (["<stop>", "<turn>", "<tool>", "[PAD]"], {"eos": 28, "eot": 29, "eom": 30}),
    "gpt-oss": (["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>"], {"eos": 28}),
    "solar": (["<|flush|>", "<|calls|>", "<|end|>"], {"eos": 28}),
    "gemma 4": (["<eos>", "<turn|>", "<|tool_response>", "</s>"], {"eos": 28}),
    "none": (["<stop>"], {}), "beyond": (["<stop>"], {"eos": 2**31}), "granite": (["<|end_of_text|>"], {"eos": 28}),
    "fim pad by id": (["<stop>", "<|fim_pad|>"], {"eos": 28, "fim_pad": 28}),
    "deepseek": (["<｜end▁of▁sentence｜>", "<｜User｜>"], {"eos": 28}), "kimi": (["[EOS]", "[EOT]"], {"eos": 28}),
}  # fmt: skip


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("name", _VOCABULARIES)
def test_ends_and_special_tokens_are_llama_cpps(name: str, typed: bool, tmp_path: Path) -> None:
    added, ids = _VOCABULARIES[name]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": [*_WORDS, *added],
        "tokenizer.ggml.merges": ["a b"], **{f"tokenizer.ggml.{key}_token_id": ids[key] for key in ids},
    }  # fmt: skip
    if typed:
        metadata["tokenizer.ggml.token_type"] = [1] * len(_WORDS) + [3] * len(added)
    metadata["tokenizer.ggml.merges"] = ["Ġ x"]
    metadata["tokenizer.ggml.tokens"][-len(added) - 1] = "Ġx"
    ours = special_tokens(metadata, "x.gguf")
    text = "a x".join(added) + "xx"
    with _llama_cpp(metadata, tmp_path / "v.gguf") as theirs:
        vocabulary = llama_cpp.llama_model_get_vocab(theirs.model)
        assert vocabulary is not None
        ends = {index for index in range(len(ours.texts)) if llama_cpp.llama_vocab_is_eog(vocabulary, index)}
        tokens = theirs.tokenize(text.encode(), add_bos=False, special=True)
    assert set(ours.ends) == ends
    assert tokenizer_from_metadata(metadata, "x.gguf")(text)["input_ids"] == tokens
