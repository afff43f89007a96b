"""The mask of trained tokens, token by token, for the chat templates of four families.

Expected tokens are written by hand: pieces between spaces, `·` for a space, `↵` for a newline, and the trained ones in
square brackets. Each family's tokenizer is trained here on just those pieces, so that each is one token.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.data.encode import encode
from entrenar.data.rows import Message, Row
from entrenar.gguf.pre_tokenizers import PRE_TOKENIZERS

_TEMPLATES = Path(__file__).parents[1] / "templates"


@dataclass(frozen=True)
class Family:
    """A model family: how it splits text, its special tokens, and the multi-turn chat in hand-written pieces."""

    split: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    end_of_turn: str
    adds_bos: bool
    expected: str
    system: bool = True


_CHATML = (
    "<|im_start|> system ↵ Be ·brief . <|im_end|> ↵ "
    "<|im_start|> user ↵ Hi , ·who ·are ·you ? <|im_end|> ↵ "
    "<|im_start|> assistant ↵ [ I ·am ·Bo · 4 2 . <|im_end|> ] ↵ "
    "<|im_start|> user ↵ Bye ! <|im_end|> ↵ "
    "<|im_start|> assistant ↵ [ See ·you . <|im_end|> ] ↵"
)
_LLAMA3 = (
    "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ↵↵ Be ·brief . <|eot_id|> "
    "<|start_header_id|> user <|end_header_id|> ↵↵ Hi , ·who ·are ·you ? <|eot_id|> "
    "<|start_header_id|> assistant <|end_header_id|> ↵↵ [ I ·am ·Bo · 42 . <|eot_id|> ] "
    "<|start_header_id|> user <|end_header_id|> ↵↵ Bye ! <|eot_id|> "
    "<|start_header_id|> assistant <|end_header_id|> ↵↵ [ See ·you . <|eot_id|> ]"
)
_GEMMA2 = (
    "<bos> <start_of_turn> user ↵ Hi , ·who ·are ·you ? <end_of_turn> ↵ "
    "<start_of_turn> model ↵ [ I ·am ·Bo · 4 2 . <end_of_turn> ] ↵ "
    "<start_of_turn> user ↵ Bye ! <end_of_turn> ↵ "
    "<start_of_turn> model ↵ [ See ·you . <end_of_turn> ] ↵"
)
_FAMILIES = {
    "smollm2": Family(
        "smollm", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "<|im_start|>", "<|im_end|>", "<|im_end|>", False, _CHATML,
    ),
    "llama3": Family(
        "llama-bpe",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", True, _LLAMA3,
    ),
    "qwen2_5": Family(
        "qwen2", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>", False, _CHATML
    ),
    "gemma2": Family(
        "", ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>", "<eos>", "<end_of_turn>", True, _GEMMA2, system=False,
    ),
}  # fmt: skip
_CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi, who are you?"},
    {"role": "assistant", "content": "I am Bo 42."},
    {"role": "user", "content": "Bye!"},
    {"role": "assistant", "content": "See you."},
]


def _pieces(family: Family) -> list[tuple[str, bool]]:
    """The hand-written line as (piece, trained)."""
    pieces, trained = [], False
    for word in family.expected.split(" "):
        if word in "[]":
            trained = word == "["
        else:
            pieces.append((word.replace("·", " ").replace("↵", "\n"), trained))
    return pieces


def _byte_level(family: Family, words: list[str]) -> Tokenizer:
    split = PRE_TOKENIZERS[family.split]
    backend = Tokenizer(BPE(ignore_merges=split.ignore_merges))
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre.ByteLevel.alphabet()
    trainer = BpeTrainer(special_tokens=list(family.special), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(words, trainer)
    backend.pre_tokenizer = split.make()
    if split.normalizer:
        backend.normalizer = split.normalizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(family: Family, words: list[str]) -> Tokenizer:
    """Gemma's kind: spaces as ▁, no split, single bytes for what is not in the vocabulary."""
    trained = Tokenizer(BPE())
    trained.train_from_iterator([word.replace(" ", "▁") for word in words], BpeTrainer(show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = [*family.special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    return backend


def _make(name: str) -> PreTrainedTokenizerFast:
    family = _FAMILIES[name]
    words = [piece for piece, _ in _pieces(family) if piece not in family.special]
    backend = _byte_level(family, words) if family.split else _sentencepiece(family, words)
    if family.adds_bos and family.bos:
        special = [(family.bos, backend.token_to_id(family.bos))]
        backend.post_processor = TemplateProcessing(single=f"{family.bos} $A", pair=None, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer with its real chat template for each family."""
    return {name: _make(name) for name in _FAMILIES}


def _chat(name: str, turns: int = 5) -> tuple[Message, ...]:
    """The conversation up to a turn; Gemma 2 knows no system role."""
    return tuple(_CHAT[0 if _FAMILIES[name].system else 1 : turns])


def _spoken(tokenizer: PreTrainedTokenizerFast, ids: list[int], flags: list[bool]) -> list[tuple[str, bool]]:
    return [(str(tokenizer.decode([token])), flag) for token, flag in zip(ids, flags, strict=True)]


def _trained_text(tokenizer: PreTrainedTokenizerFast, messages: tuple[Message, ...]) -> str:
    example = encode(Row(1, messages), tokenizer)
    return str(tokenizer.decode([i for i, flag in zip(example.ids, example.trained, strict=True) if flag]))


@pytest.mark.parametrize("name", _FAMILIES)
def test_exactly_the_answers_and_their_end_of_turn_are_trained(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer = tokenizers[name]
    example = encode(Row(3, _chat(name)), tokenizer)
    assert _spoken(tokenizer, example.ids, example.trained) == _pieces(_FAMILIES[name])
    assert example.line == 3


@pytest.mark.parametrize("turns", [3, 5])
@pytest.mark.parametrize("name", _FAMILIES)
def test_tokens_are_those_the_model_is_served(
    name: str, turns: int, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    served: Any = tokenizers[name].apply_chat_template(list(_chat(name, turns)), tokenize=True, return_dict=False)
    assert encode(Row(1, _chat(name, turns)), tokenizers[name]).ids == served


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_a_template_that_writes_bos_gets_no_second_one(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer = tokenizers[name]
    plain: Any = tokenizer("Hi")["input_ids"]
    assert plain[0] == tokenizer.bos_token_id, "this tokenizer adds a BOS of its own, as the real one does"
    assert encode(Row(1, _chat(name)), tokenizer).ids.count(plain[0]) == 1


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5"])
def test_a_default_system_prompt_is_not_trained(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    messages = tuple(_CHAT[1:3])
    example = encode(Row(1, messages), tokenizers[name])
    assert "helpful" in str(tokenizers[name].decode(example.ids))
    assert _trained_text(tokenizers[name], messages) == "I am Bo 42.<|im_end|>"


@pytest.mark.parametrize("name", _FAMILIES)
def test_a_last_turn_of_the_user_is_not_trained(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    expected = "I am Bo 42." + _FAMILIES[name].end_of_turn
    assert _trained_text(tokenizers[name], _chat(name, turns=4)) == expected


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen2_5"])
def test_the_same_words_outside_an_answer_are_not_trained(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    said = [("system", "I am Bo 42."), ("user", "I am Bo 42."), ("assistant", "I am Bo 42."), ("user", "I am Bo 42.")]
    messages = tuple({"role": role, "content": content} for role, content in said)
    assert _trained_text(tokenizers[name], messages) == "I am Bo 42." + _FAMILIES[name].end_of_turn


@pytest.mark.parametrize("name", _FAMILIES)
@settings(max_examples=25, deadline=None)
@given(answer=st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=12))
def test_every_byte_of_any_answer_is_trained(
    name: str, answer: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    """Characters of several tokens, spaces, newlines, digits: all of the answer, nothing but the answer."""
    tokenizer, end = tokenizers[name], _FAMILIES[name].end_of_turn
    answer = f"Z{answer}Z"  # Llama 3 and Gemma 2 trim their turns
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer})
    normal = tokenizer.backend_tokenizer.normalizer
    expected = answer if normal is None else normal.normalize_str(answer).replace("▁", " ")
    assert _trained_text(tokenizer, messages) == expected + end


@pytest.mark.parametrize("name", _FAMILIES)
def test_plain_text_is_trained_whole_and_ends(name: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer, family = tokenizers[name], _FAMILIES[name]
    example = encode(Row(1, text="I am Bo."), tokenizer)
    start = [(family.bos, False)] if family.adds_bos else []
    body = [(piece, True) for piece in ("I", " am", " Bo", ".", family.eos)]
    assert _spoken(tokenizer, example.ids, example.trained) == start + body


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_plain_text_that_writes_its_bos_and_eos_gets_no_second_ones(
    name: str, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer, family = tokenizers[name], _FAMILIES[name]
    written = encode(Row(1, text=f"{family.bos}I am Bo.{family.eos}"), tokenizer)
    assert written == encode(Row(1, text="I am Bo."), tokenizer)


def test_a_conversation_without_a_chat_template_is_an_input_error() -> None:
    bare = _make("smollm2")
    bare.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        encode(Row(1, _chat("smollm2")), bare)


def test_what_the_template_refuses_is_an_input_error(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    with pytest.raises(InputError, match="System role not supported"):
        encode(Row(1, tuple(_CHAT)), tokenizers["gemma2"])
    with pytest.raises(InputError, match="must alternate"):
        encode(Row(1, (*_CHAT[1:3], _CHAT[4])), tokenizers["gemma2"])


def test_a_template_that_cuts_what_the_user_says_is_an_input_error() -> None:
    forgetful = _make("smollm2")
    forgetful.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content | truncate(3) }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(InputError, match="leaves out or rewrites turn 2"):
        encode(Row(1, _chat("smollm2")), forgetful)
