"""How families split text before merging, by hand; and the name llama.cpp has for a tokenizer's split."""

import json

import pytest
from tokenizers import Tokenizer
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE

from entrenar.core.errors import InputError
from entrenar.gguf.pre_tokenizers import PRE_TOKENIZERS, by_name, name_of

# `·` is a space and `↵` a newline; pieces are parted by `|`.
_SPLITS = [
    ("gpt-2", "It·costs·1234·euros", "It|·costs|·1234|·euros"),
    ("smollm", "It·costs·1234·euros", "It|·costs|·|1|2|3|4|·euros"),
    ("llama-bpe", "It·costs·1234·euros", "It|·costs|·|123|4|·euros"),
    ("qwen2", "It·costs·1234·euros", "It|·costs|·|1|2|3|4|·euros"),
    ("gpt-2", "don't·DON'T", "don|'t|·DON|'|T"),
    ("smollm", "don't·DON'T", "don|'t|·DON|'|T"),
    ("llama-bpe", "don't·DON'T", "don|'t|·DON|'T"),
    ("qwen2", "don't·DON'T", "don|'t|·DON|'T"),
    ("gpt-2", "a·(b)...↵↵c", "a|·(|b|)...|↵|↵|c"),
    ("smollm", "a·(b)...↵↵c", "a|·(|b|)...|↵|↵|c"),
    ("llama-bpe", "a·(b)...↵↵c", "a|·(|b|)...↵↵|c"),
    ("qwen2", "a·(b)...↵↵c", "a|·(|b|)...↵↵|c"),
    ("gpt-2", "x·=·y;···z", "x|·=|·y|;|··|·z"),
    ("llama-bpe", "x·=·y;···z", "x|·=|·y|;|··|·z"),
    ("llama-bpe", "x·=·(y)_z", "x|·=|·(|y|)_|z"),
    ("smollm", "x·=·(y)_z", "x|·=|·(|y|)_|z"),
    ("smollm", "½·٣x", "½|·|٣|x"),
    ("qwen2", "ñandú·漢字!", "ñandú|·漢字|!"),
    ("dbrx", "It·costs·1234·euros", "It|·costs|·|123|4|·euros"),
    ("gpt-4o", "It·costs·1234·euros", "It|·costs|·|123|4|·euros"),
    ("gpt-4o", "don't·DON'T·camelCase", "don't|·DON'T|·camel|Case"),
    ("tekken", "don't·DON'T·camelCase·12", "don|'t|·DON|'T|·camel|Case|·|1|2"),
    ("tekken", "a·(b)/↵c", "a|·(|b|)/↵|c"),
    ("default", "It·costs·1234·euros", "It|·costs|·|123|4|·euros"),
    ("default", "don't·DON'T", "don|'|t|·DON|'|T"),
    ("default", "x·=·(y)_z·,·b", "x|·|=|·|(|y|)_|z|·|,|·b"),
]


def _pieces(splitter: pre.PreTokenizer, text: str) -> list[str]:
    """What lies between the cuts, in characters (the pieces themselves are in GPT-2's alphabet of bytes)."""
    return [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]


@pytest.mark.parametrize(("name", "text", "expected"), _SPLITS)
def test_text_is_cut_where_the_family_cuts_it(name: str, text: str, expected: str) -> None:
    plain, pieces = (line.replace("·", " ").replace("↵", "\n") for line in (text, expected))
    for make in (PRE_TOKENIZERS[name].make, PRE_TOKENIZERS[name].as_llama_cpp):
        assert _pieces(make(), plain) == pieces.split("|")


@pytest.mark.parametrize("name", ["tekken", "gpt-4o"])
def test_llama_cpp_cuts_other_capitals_than_the_published_ones(name: str) -> None:
    """It knows A to Z alone, and no marks: what it was asked in tests/interop/test_gguf_tokenizers.py."""
    row = PRE_TOKENIZERS[name]
    assert _pieces(row.make(), "ÉCOLE e\u0301") == ["ÉCOLE", " e\u0301"]
    assert _pieces(row.as_llama_cpp(), "ÉCOLE e\u0301") == ["É", "COLE", " e", "\u0301"]
    for make in (row.make, row.as_llama_cpp):  # both are called so, whichever file they come from
        tokenizer = Tokenizer(BPE(ignore_merges=row.ignore_merges))
        tokenizer.pre_tokenizer = make()
        assert name_of(tokenizer) == name


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_no_byte_is_lost_or_added_before_merging(name: str) -> None:
    text = " a  b\n\nçé漢\U0001f600 12345\t. "
    assert len("".join(piece for piece, _ in PRE_TOKENIZERS[name].make().pre_tokenize_str(text))) == len(text.encode())


_LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_REGEX = _LLAMA3_REGEX.replace("{1,3}", "")
_TEKKEN_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES: dict[str, object] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _sequence(*steps: dict[str, object]) -> dict[str, object]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _split(regex: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


# As the `tokenizer.json` of GPT-2, SmolLM2, Llama 3, Qwen 2.5, Phi-4, Phi-4 mini and Mistral NeMo have it.
_PUBLISHED = {
    "gpt-2": _BYTES | {"use_regex": True},
    "smollm": _sequence({"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}),
    "llama-bpe": _sequence(_split(_LLAMA3_REGEX), _BYTES | {"use_regex": False}),
    "qwen2": _sequence(_split(_QWEN2_REGEX), _BYTES | {"use_regex": False, "trim_offsets": False}),
    "dbrx": _sequence(_split(_LLAMA3_REGEX) | {"behavior": "Removed", "invert": True}, _BYTES | {"use_regex": False}),
    "gpt-4o": _sequence(_split(_O200K_REGEX) | {"behavior": "Removed", "invert": True}, _BYTES | {"use_regex": False}),
    "tekken": _sequence(_split(_TEKKEN_REGEX), _BYTES | {"use_regex": False}),
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_tokenizers_have_their_llama_cpp_name(name: str) -> None:
    model = BPE(ignore_merges=PRE_TOKENIZERS[name].ignore_merges)
    state = json.loads(Tokenizer(model).to_str()) | {"pre_tokenizer": _PUBLISHED[name]}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    assert name_of(tokenizer) == name
    text = "In 2024, it's 1234567 · x²!\n\n  Ça va?"
    assert tokenizer.pre_tokenizer is not None
    assert _pieces(tokenizer.pre_tokenizer, text) == _pieces(by_name(name, "x.gguf").make(), text)


@pytest.mark.parametrize(
    ("alias", "name"), [("falcon3", "llama-bpe"), ("llama3", "llama-bpe"), ("starcoder", "smollm"), ("megrez", "qwen2")]
)
def test_other_names_of_the_same_split(alias: str, name: str) -> None:
    assert by_name(alias, "x.gguf") is PRE_TOKENIZERS[name]


def test_an_unknown_name_is_an_input_error_that_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"x\.gguf splits text by 'superbpe'.*gpt-2, smollm, llama-bpe, qwen2"):
        by_name("superbpe", "x.gguf")


@pytest.mark.parametrize("splitter", [
    None, pre.Whitespace(), pre.ByteLevel(add_prefix_space=True, use_regex=True),
    pre.Sequence([pre.Digits(individual_digits=False), pre.ByteLevel(add_prefix_space=False, use_regex=True)]),
], ids=["none", "whitespace", "prefix space", "digits together"])  # fmt: skip
def test_a_split_without_a_name_is_an_input_error(splitter: pre.PreTokenizer | None) -> None:
    """Rather than a file whose tokens are silently others."""
    tokenizer = Tokenizer(BPE())
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    with pytest.raises(InputError, match="no name for"):
        name_of(tokenizer)
