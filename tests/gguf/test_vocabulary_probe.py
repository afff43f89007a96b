"""What a GGUF cannot say of a tokenizer is refused or said; nothing of it is dropped without a word."""

from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import normalizers as norm
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.exporting.gguf import vocabulary_metadata
from entrenar.gguf.special_tokens import CONTROL, USER_DEFINED
from tests.support.gguf_tokenizers import TOKENIZERS

_BLANKS = norm.Replace(" ", "▁")


def made(kind: str = "llama-bpe", normalizer: Any = None) -> Any:
    tokenizer: PreTrainedTokenizerFast = TOKENIZERS[kind]()
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def keys_of(tokenizer: PreTrainedTokenizerFast, *ends: int) -> tuple[dict[str, Any], list[str]]:
    """The written keys, and what was said."""
    said: list[str] = []
    return dict(vocabulary_metadata(tokenizer, len(tokenizer) + 2, ends, said.append)), said


@pytest.mark.parametrize("kind", ["llama-bpe", "smollm", "gpt-2"])
@pytest.mark.parametrize(
    ("normalizer", "named"),
    [
        (norm.Lowercase(), "Lowercase"),
        (norm.NFKC(), "NFKC"),
        (norm.NFD(), "NFD"),
        (norm.StripAccents(), "StripAccents"),
        (norm.Strip(), "Strip"),
        (norm.Replace("``", '"'), "Replace"),
        (norm.Prepend("x"), "Prepend"),
        (norm.Sequence([norm.NFC(), norm.Lowercase()]), r"\(Lowercase"),
        (norm.BertNormalizer(), "BertNormalizer"),
    ],
)
def test_a_normalizer_that_changes_tokens_is_refused_by_name(kind: str, normalizer: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"llama.cpp would not read text as this tokenizer does.*{named}"):
        keys_of(made(kind, normalizer))


@pytest.mark.parametrize("normalizer", [norm.NFKC(), norm.Lowercase(), norm.Replace("“", '"')])
@pytest.mark.parametrize("kind", ["gemma", "llama 2"])
def test_so_it_is_beside_sentencepieces_own(kind: str, normalizer: Any) -> None:
    own = [norm.Prepend("▁")] if kind == "llama 2" else []
    keys_of(made(kind, norm.Sequence([*own, _BLANKS])))
    with pytest.raises(InputError, match="has no place in a GGUF"):
        keys_of(made(kind, norm.Sequence([normalizer, *own, _BLANKS])))


def test_composing_is_let_go_as_llama_cpps_converter_does_and_said() -> None:
    _, said = keys_of(made("smollm", norm.NFC()))
    assert any("composed form (NFC)" in sentence for sentence in said)
    assert keys_of(made("smollm"))[1] == []


def test_a_normalizer_that_changes_no_token_is_written() -> None:
    assert keys_of(made("llama-bpe", norm.Replace("\U0010fff0", "x")))[1] == []


def test_tokens_around_a_text_are_bos_and_eos_or_refused() -> None:
    tokenizer = made()
    tokenizer.backend_tokenizer.post_processor = _around("<s> $A </s>", tokenizer)
    keys, _ = keys_of(tokenizer)
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is True
    assert "tokenizer.ggml.add_eos_token" not in keys_of(made())[0]
    tokenizer.backend_tokenizer.post_processor = _around("<|im_start|> $A", tokenizer)
    with pytest.raises(InputError, match=r"puts <\|im_start\|> around every text"):
        keys_of(tokenizer)


def _around(single: str, tokenizer: PreTrainedTokenizerFast) -> TemplateProcessing:
    words = [word for word in single.split() if word != "$A"]
    ids = [(word, tokenizer.backend_tokenizer.token_to_id(word)) for word in words]
    return TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=ids)


@pytest.mark.parametrize("sides", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_blanks_that_an_added_token_swallows_are_said(sides: dict[str, bool]) -> None:
    tokenizer = made()
    tokenizer.add_tokens([AddedToken("<|turn|>", normalized=False, special=True, **sides)])
    assert any("<|turn|>" in sentence for sentence in keys_of(tokenizer)[1])


def test_added_tokens_are_control_or_users_own_as_llama_cpps_converter_has_them() -> None:
    tokenizer = made()
    added = {"<marked>": True, "<plain>": False, "<|looks|>": False, "<｜looks｜>": False, "<unused7>": False}
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in added.items()])
    types = keys_of(tokenizer)[0]["tokenizer.ggml.token_type"]
    found = {text: types[tokenizer.convert_tokens_to_ids(text)] for text in added}
    assert found == {text: USER_DEFINED if text == "<plain>" else CONTROL for text in added}


def test_named_chat_templates_are_written_as_gguf_py_does(tmp_path: Any) -> None:
    import gguf

    tokenizer = made()
    plain: Any = tokenizer.chat_template
    templates = {"default": plain, "tool_use": plain + "tools", "with rag": plain + "rag"}
    tokenizer.chat_template = templates  # pyright: ignore
    keys, _ = keys_of(tokenizer)
    writer = gguf.GGUFWriter(tmp_path / "x", "llama")
    writer.add_chat_template([{"name": name, "template": text} for name, text in templates.items()])
    theirs = {key: value.value for key, value in writer.kv_data[0].items() if "chat_template" in key}
    ours = {key: value for key, value in keys.items() if "chat_template" in key}
    assert sorted(theirs.pop("tokenizer.chat_templates")) == sorted(ours.pop("tokenizer.chat_templates"))
    assert ours == theirs


def test_templates_that_would_share_a_name_are_refused() -> None:
    tokenizer = made()
    tokenizer.chat_template = {"default": "a", "tool use": "b", "tool_use": "c"}  # pyright: ignore
    with pytest.raises(InputError, match="would have one name in a GGUF: 'tool_use'"):
        keys_of(tokenizer)


def test_what_ends_an_answer_is_in_the_file() -> None:
    tokenizer = made()  # eos </s>; its template ends turns with <|im_end|>
    end, unknown, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<unk>", "<|im_start|>"])
    keys, said = keys_of(tokenizer)
    assert keys["tokenizer.ggml.eot_token_id"] == end
    assert "tokenizer.ggml.eom_token_id" not in keys
    assert said == []
    keys, said = keys_of(tokenizer, tokenizer.eos_token_id, unknown, end, start)
    assert (keys["tokenizer.ggml.eot_token_id"], keys["tokenizer.ggml.eom_token_id"]) == (end, unknown)
    assert said == ["a GGUF has keys for three ends of an answer; <|im_start|> must be known by its text"]
    tokenizer.chat_template = None
    assert "tokenizer.ggml.eot_token_id" not in keys_of(tokenizer, tokenizer.eos_token_id)[0]
