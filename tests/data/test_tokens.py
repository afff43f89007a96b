"""Tokens made by stretches are those of the whole text, whatever a tokenizer does at an added token."""

import os
import signal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import EntrenarError, InputError
from entrenar.data.encode import encode
from entrenar.data.parallel import encode_all
from entrenar.data.rows import Row
from entrenar.data.template import ChatTemplate
from entrenar.data.tokens import all_tokens
from entrenar.data.turn_end import template_of

_TEXTS = ["user assistant a b ab  ba\n\nthe end ▁x", "system Roses are red.  \n x"] * 30
_KINDS: dict[str, tuple[Any, Any]] = {
    "bytes": (None, pre.ByteLevel(add_prefix_space=False)),
    "bytes with a space before": (None, pre.ByteLevel(add_prefix_space=True)),
    "metaspace, at the first word": (None, pre.Metaspace(prepend_scheme="first")),
    "metaspace, always": (None, pre.Metaspace(prepend_scheme="always")),
    "a normalizer that prepends": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    "a normalizer that strips": (normalizers.Strip(), pre.ByteLevel(add_prefix_space=False)),
    "letters in lower case": (normalizers.Lowercase(), pre.ByteLevel(add_prefix_space=False)),
}
_ADDED = (
    AddedToken("<|a|>", special=True, normalized=False),
    AddedToken("<|left|>", special=True, normalized=False, lstrip=True),
    AddedToken("<|right|>", special=True, normalized=False, rstrip=True),
    AddedToken("<think>", special=False, normalized=False),
    AddedToken("word", special=True, normalized=False, single_word=True),
    AddedToken("<NORMAL>", special=True, normalized=True),
)


def _make(kind: str, *, more: tuple[AddedToken, ...] = ()) -> PreTrainedTokenizerFast:
    normalizer, splitter = _KINDS[kind]
    backend = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None:
        backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_TEXTS, trainer)
    backend.add_tokens([*_ADDED, *more])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


_PARTS = st.sampled_from([
    *(str(token) for token in _ADDED), " ", "  ", "\n", "a", "The ab", "words", "<|", "|>", "▁", "<|a|", "é", "ba",
])  # fmt: skip


@pytest.fixture(scope="module", params=_KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    tokenizer = _make(request.param)
    all_tokens(["<|a|>The  ab <|right|> ba"] * 64, tokenizer)  # tried
    return tokenizer


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(_PARTS, max_size=12).map("".join), max_size=3))
def test_stretches_are_the_whole(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert all_tokens(texts, tokenizer) == expected


def test_tokens_that_hold_each_other_are_not_parted() -> None:
    tokenizer = _make("bytes", more=(AddedToken("<|a|>b", special=True, normalized=False),))
    text = "x<|a|>b y<|a|> b"
    for _ in range(3):
        assert all_tokens([text] * 64, tokenizer)[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokens_that_are_added_later_are_known() -> None:
    tokenizer = _make("bytes")
    all_tokens(["<|a|>x"] * 80, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    text = "<|a|>a<|new|>b"
    assert all_tokens([text], tokenizer)[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


_CHAT = (
    "{% for m in messages %}<|a|>{{ m.role }}\n{{ m.content }}<|right|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|a|>assistant\n{% endif %}{% if strftime_now is defined and false %}{% endif %}"
)


def _rows(count: int) -> list[Row]:
    """Every tenth says nothing that can be trained."""
    return [
        Row(
            line,
            (
                {"role": "user", "content": f"ab {line}"},
                {"role": "assistant", "content": "" if line % 10 == 0 else f"ba {line}"},
            ),
        )
        for line in range(1, count + 1)
    ]


def _template() -> ChatTemplate:
    tokenizer = _make("bytes")
    tokenizer.chat_template = _CHAT
    tokenizer.eos_token = "<|right|>"
    return template_of(tokenizer)


def test_several_processes_make_the_same_examples_in_the_same_order() -> None:
    rows, template = _rows(400), _template()
    alone = list(encode_all(rows, template, processes=1))
    together = list(encode_all(rows, template, processes=3))
    assert [type(one) for one in alone] == [type(one) for one in together]
    assert [str(one) for one in alone] == [str(one) for one in together]
    assert sum(isinstance(one, InputError) for one in alone) == 40
    assert alone[0] == encode(rows[0], template.tokenizer, template)


def test_a_template_that_reads_the_clock_in_another_process_is_known_to() -> None:
    template = _template()
    template.tokenizer.chat_template = "{{ strftime_now('%Y') }}" + _CHAT
    list(encode_all(_rows(200), template, processes=2))
    assert template.reads_clock


def test_a_process_that_is_killed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()

    def encode_or_die(*args: Any) -> Any:
        if os.getpid() != parent and args[0].line == 150:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*args)

    monkeypatch.setattr("entrenar.data.parallel.encode", encode_or_die)
    with pytest.raises(EntrenarError, match="was ended from outside"):
        list(encode_all(_rows(400), _template(), processes=2))
