"""Tokenizers rebuilt from GGUF metadata give the ids of those they were made from."""

import copy
import json
import random
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers import decoders as decode
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.exporting.gguf import vocabulary_metadata
from entrenar.gguf.pre_tokenizers import PRE_TOKENIZERS
from entrenar.gguf.reader import GGUFFile
from entrenar.gguf.tokenizer import tokenizer_from_metadata

_CORPUS = ["The quick brown fox jumps over 12345 lazy dogs, isn't it?\n\nDON'T panic! (x = y_1 + 20.5) ñandú 漢字"] * 2
_SPECIAL = ["<unk>", "<s>", "</s>"]
_ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
_WORDS = st.lists(
    st.sampled_from([*_CORPUS[0].split(), *_SPECIAL, "  ", "\n", "777", "漢", "\U0001f600"]), max_size=12
).map(" ".join)


def _byte_level(split: str) -> Tokenizer:
    """A BPE trained with one split of the table."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[split].make()
    backend.decoder = decode.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=330, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


def _metadata(backend: Tokenizer, split: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a tokenizer.json."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in _SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: Any = tokenizer(text)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def byte_level_pairs() -> dict[str, tuple[Tokenizer, PreTrainedTokenizerFast]]:
    """For each split: the trained tokenizer, and ours from its metadata."""
    trained = {split: _byte_level(split) for split in PRE_TOKENIZERS}
    return {
        split: (backend, tokenizer_from_metadata(_metadata(backend, split), "x.gguf"))
        for split, backend in trained.items()
    }


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2"])
@settings(max_examples=40, deadline=None)
@given(text=_WORDS | _ANY_TEXT)
def test_byte_level_ids_are_those_of_the_original(
    byte_level_pairs: dict[str, tuple[Tokenizer, PreTrainedTokenizerFast]], split: str, text: str
) -> None:
    original, ours = byte_level_pairs[split]
    assert _ids(ours, text) == original.encode(text).ids
    assert ours.decode(_ids(ours, text)) == text


def test_llama3_takes_a_word_of_the_vocabulary_whole_whatever_its_merges() -> None:
    """`ignore_merges`: without it this word, which no merge makes, would be single bytes."""
    backend = _byte_level("llama-bpe")
    metadata = _metadata(backend, "llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("zebra")
    metadata["tokenizer.ggml.token_type"].append(1)
    metadata["tokenizer.ggml.add_bos_token"] = False
    word = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert _ids(tokenizer_from_metadata(metadata, "x.gguf"), "zebra") == [word]
    assert len(_ids(tokenizer_from_metadata(metadata | {"tokenizer.ggml.pre": "gpt-2"}, "x.gguf"), "zebra")) > 1


def test_characters_are_not_composed_as_llama_cpp_does_not(
    byte_level_pairs: dict[str, tuple[Tokenizer, PreTrainedTokenizerFast]],
) -> None:
    """Qwen's published tokenizers do."""
    ours = byte_level_pairs["qwen2"][1]
    assert _ids(ours, "n\u0303") != _ids(ours, "ñ")


def test_special_tokens_are_single_and_the_template_comes_along() -> None:
    metadata = _metadata(_byte_level("gpt-2"), "gpt-2") | {"tokenizer.chat_template": "{{ messages[0].content }}"}
    ours = tokenizer_from_metadata(metadata, "x.gguf")
    assert _ids(ours, "<s>The</s>")[0] == 1
    assert _ids(ours, "<s>The</s>")[-1] == 2
    assert (ours.unk_token, ours.bos_token, ours.eos_token, ours.pad_token) == ("<unk>", "<s>", "</s>", None)
    assert ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    assert ours.decode(_ids(ours, "<s>The fox</s>"), skip_special_tokens=True) == "The fox"


@pytest.mark.parametrize(("asked", "starts"), [(True, True), (False, False), (None, False)])
def test_a_bos_is_added_where_the_file_says_so(asked: bool | None, starts: bool) -> None:
    """Byte-level files that say nothing add none; SentencePiece ones do (llama.cpp's defaults)."""
    metadata = _metadata(_byte_level("gpt-2"), "gpt-2")
    if asked is not None:
        metadata["tokenizer.ggml.add_bos_token"] = asked
    assert (_ids(tokenizer_from_metadata(metadata, "x.gguf"), "The fox")[0] == 1) == starts


@pytest.mark.parametrize(
    ("split", "starts"), [("llama-bpe", True), ("tekken", True), ("gpt-2", False), ("qwen2", False)]
)
def test_some_splits_come_with_a_bos(split: str, starts: bool) -> None:
    """Llama 3's and Mistral's files from before `add_bos_token` was written."""
    metadata = _metadata(_byte_level(split), split)
    assert (_ids(tokenizer_from_metadata(metadata, "x.gguf"), "The fox")[0] == 1) == starts


def test_an_eos_is_added_where_the_file_says_so() -> None:
    metadata = _metadata(_byte_level("gpt-2"), "gpt-2") | {"tokenizer.ggml.add_eos_token": True}
    assert _ids(tokenizer_from_metadata(metadata, "x.gguf"), "The")[-1] == 2
    both = tokenizer_from_metadata(metadata | {"tokenizer.ggml.add_bos_token": True}, "x.gguf")
    assert [_ids(both, "The")[place] for place in (0, -1)] == [1, 2]


@pytest.mark.parametrize("names", [["default", "tool_use"], ["default"], ["rag", "tool_use"], []])
def test_templates_with_names_come_back_as_they_were_written(
    names: list[str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Which of them transformers then chooses is its own business."""
    written = copy.copy(tiny_tokenizer)
    templates = {name: f"{name}: {{{{ messages[0].content }}}}" for name in names}
    written.chat_template = templates or None  # pyright: ignore[reportAttributeAccessIssue]
    back = tokenizer_from_metadata(vocabulary_metadata(written, len(written)), "x.gguf")
    assert back.chat_template == (templates["default"] if names == ["default"] else templates or None)
    if "default" in names:
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        assert back.get_chat_template(tools=tools) == written.get_chat_template(tools=tools)  # pyright: ignore
        assert back.get_chat_template() == templates["default"]


def test_a_template_with_a_name_that_is_no_text_is_refused() -> None:
    metadata = _metadata(_byte_level("gpt-2"), "gpt-2") | {"tokenizer.chat_template.rag": 3}
    with pytest.raises(InputError, match=r"x\.gguf has a chat template that is no text"):
        tokenizer_from_metadata(metadata, "x.gguf")


@pytest.mark.parametrize("named", [True, False])
def test_a_file_that_does_not_say_its_split_has_llama_cpps_default(named: bool) -> None:
    backend = _byte_level("default")
    metadata = _metadata(backend, "default")
    if not named:
        del metadata["tokenizer.ggml.pre"]
    text = "It costs 12345 euros, don't it? (x = y_1)"
    ours = tokenizer_from_metadata(metadata, "x.gguf")
    assert _ids(ours, text) == backend.encode(text).ids
    assert [ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[place][0] for place in (2, 3)] == ["Ġ", "123"]


def test_merges_count_once_and_those_that_never_happen_do_not_count() -> None:
    """What llama.cpp does with them: the first rank of two, none of what is made of no token."""
    backend = _byte_level("gpt-2")
    metadata = _metadata(backend, "gpt-2")
    odd = [*metadata["tokenizer.ggml.merges"], metadata["tokenizer.ggml.merges"][0], "nonsense", "xyz zyx"]
    ours = tokenizer_from_metadata(metadata | {"tokenizer.ggml.merges": odd}, "x.gguf")
    assert _ids(ours, _CORPUS[0]) == backend.encode(_CORPUS[0]).ids


def test_a_merge_that_makes_no_token_is_refused_unless_it_comes_to_the_same() -> None:
    """llama.cpp merges it and takes it apart into bytes: two ASCII letters come out as they were."""
    metadata = _metadata(_byte_level("gpt-2"), "gpt-2") | {"tokenizer.ggml.merges": ["q z"]}
    ours = tokenizer_from_metadata(metadata, "x.gguf")
    assert ours.convert_ids_to_tokens(_ids(ours, "qz")) == ["q", "z"]
    for merges in (["Ã ±"], ["q z", "qz q"]):
        with pytest.raises(InputError, match=r"x\.gguf: the merge .* is of .*, which is none of its tokens"):
            tokenizer_from_metadata(metadata | {"tokenizer.ggml.merges": merges}, "x.gguf")


def test_a_name_alone_makes_no_token_special() -> None:
    """A plain token as eos is not cut out of texts: llama.cpp goes by types."""
    metadata = _metadata(_byte_level("gpt-2"), "gpt-2")
    eos = metadata["tokenizer.ggml.tokens"].index("e")
    ours = tokenizer_from_metadata(metadata | {"tokenizer.ggml.eos_token_id": eos}, "x.gguf")
    assert _ids(ours, "The quick") == _ids(tokenizer_from_metadata(metadata, "x.gguf"), "The quick")


def test_phi_3s_special_tokens_take_the_blanks_behind_them() -> None:
    metadata = _sentencepiece_metadata(0, add_bos_token=False)
    plain, phi3 = (tokenizer_from_metadata(metadata | name, "x.gguf") for name in ({}, {"general.name": "Phi-3 mini"}))
    assert _ids(phi3, "</s> \nban") == _ids(plain, "</s>ban")
    assert _ids(phi3, "<s> ban") == _ids(plain, "<s> ban")


# SentencePiece

# Single characters, and pieces of two and three that overlap, so that the order of merging decides: "ban" is
# "ba" + "n" or "b" + "an".
_LETTERS = "▁abnñ1"
_PIECES = [*_LETTERS, *map("".join, product("▁abn", repeat=2)), "▁ba", "ban", "ana", "nan", "▁an", "a1", "11", "ñ1"]


def _sentencepiece_metadata(seed: int, **changes: Any) -> dict[str, Any]:
    """A vocabulary as the converter writes it: 3 special tokens, 256 bytes, pieces with scores (in a random order)."""
    scores = random.Random(seed).sample(range(1, 999), len(_PIECES))
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(score) for score in scores],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(_PIECES),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def _merge_by_score(text: str, metadata: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE, literally: join the neighbours of the best score, leftmost first, until none; then bytes."""
    index = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    parts = list(("▁" + text).replace(" ", "▁"))
    while True:
        joined = [(scores[index[a + b]], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in index]
        if not joined:
            return [number for part in parts for number in _in_bytes(part, index)]
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _in_bytes(part: str, index: dict[str, int]) -> list[int]:
    return [index[part]] if part in index else [index[f"<0x{byte:02X}>"] for byte in part.encode()]


_NEAR_WORDS = st.text(st.sampled_from("  abnabnñ1漢\n"), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(text=_NEAR_WORDS, seed=st.integers(0, 20))
def test_sentencepiece_ids_are_those_of_its_algorithm(text: str, seed: int) -> None:
    metadata = _sentencepiece_metadata(seed)
    assert _ids(tokenizer_from_metadata(metadata, "x.gguf"), text) == [1, *_merge_by_score(text, metadata)]


@settings(max_examples=40, deadline=None)
@given(text=_ANY_TEXT.filter(lambda text: "▁" not in text))
def test_sentencepiece_text_survives(text: str) -> None:
    ours = tokenizer_from_metadata(_sentencepiece_metadata(0), "x.gguf")
    assert ours.decode(_ids(ours, text), skip_special_tokens=True) == text


def test_sentencepiece_without_a_space_before_the_text() -> None:
    """Gemma's kind."""
    metadata = _sentencepiece_metadata(0, add_space_prefix=False, add_bos_token=False)
    ours = tokenizer_from_metadata(metadata, "x.gguf")
    assert ours.convert_ids_to_tokens(_ids(ours, "ñ")) == ["ñ"]
    assert ours.decode(_ids(ours, " ban")) == " ban"


def test_a_sentencepiece_vocabulary_without_scores_is_an_input_error() -> None:
    for scores in (None, [0.0]):
        with pytest.raises(InputError, match=r"x\.gguf has no score for every token"):
            tokenizer_from_metadata(_sentencepiece_metadata(0, scores=scores), "x.gguf")


# The real one


@pytest.fixture(scope="module")
def real(smollm2: Any) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer from its GGUF."""
    return tokenizer_from_metadata(GGUFFile(smollm2).metadata, str(smollm2))


def test_smollm2_splits_every_digit_and_keeps_its_special_tokens(real: PreTrainedTokenizerFast) -> None:
    text = "<|im_start|>user\nThe year 2024<|im_end|>\n"
    pieces = [real.decode([token]) for token in _ids(real, text)]
    assert pieces == ["<|im_start|>", "user", "\n", "The", " year", " ", "2", "0", "2", "4", "<|im_end|>", "\n"]
    assert (len(real), real.bos_token_id, real.eos_token_id, real.pad_token_id) == (49152, 1, 2, 2)
    assert _ids(real, "<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]


def test_smollm2_has_the_template_the_other_tests_use(
    real: PreTrainedTokenizerFast, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert str(real.chat_template).rstrip("\n") == str(tiny_tokenizer.chat_template).rstrip("\n")


@settings(max_examples=30, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", max_codepoint=0xFFFF, exclude_categories=["Cc"]), max_size=40))
def test_smollm2_gives_back_text(real: PreTrainedTokenizerFast, text: str) -> None:
    """Its vocabulary lacks 21 single bytes, those of control characters and of planes above the first."""
    assert real.decode(_ids(real, text)) == text
