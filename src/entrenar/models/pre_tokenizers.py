"""The pre-tokenizers llama.cpp knows by name (`tokenizer.ggml.pre`), as `tokenizers` objects.

A byte-level BPE file carries only a name for how text is split before merging; the wrong split silently changes the
tokens (digits, most of all). One table serves reading and writing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre

from entrenar.core.errors import InputError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BEFORE, _ENDING = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}{_REST}"
_O200K = rf"{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}{_REST}"


@dataclass(frozen=True)
class PreTokenizer:
    """How one family splits text; `ignore_merges`: a word in the vocabulary is one token whatever the merges say."""

    make: Callable[[], pre.PreTokenizer]
    normalizer: Callable[[], norm.Normalizer] | None = None
    ignore_merges: bool = False


def _split_then_bytes(pattern: str) -> pre.PreTokenizer:
    split = pre.Split(Regex(pattern), behavior="isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(lambda: pre.ByteLevel(add_prefix_space=False, use_regex=True)),
    "smollm": PreTokenizer(
        lambda: pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    ),
    "llama-bpe": PreTokenizer(lambda: _split_then_bytes(_LLAMA3), ignore_merges=True),
    "qwen2": PreTokenizer(lambda: _split_then_bytes(_QWEN2), normalizer=norm.NFC),
    "dbrx": PreTokenizer(lambda: _split_then_bytes(_LLAMA3)),  # Phi-4
    "gpt-4o": PreTokenizer(lambda: _split_then_bytes(_O200K)),  # Phi-4 mini
    "tekken": PreTokenizer(lambda: _split_then_bytes(_TEKKEN), ignore_merges=True),  # Mistral NeMo
}
_ALIASES = {
    "default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "pixtral": "llama-bpe",
    "smaug-bpe": "dbrx", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip


def by_name(name: str, source: str) -> PreTokenizer:
    """The row called `name` in a GGUF; InputError lists the known ones."""
    row = PRE_TOKENIZERS.get(_ALIASES.get(name, name))
    if row is None:
        raise InputError(
            f"{source} splits text by {name!r}, which this version does not know: {', '.join(PRE_TOKENIZERS)}"
        )
    return row


def name_of(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of a tokenizer's split; InputError when it is none of the table's."""
    mine, ignores = _signature(tokenizer.pre_tokenizer), getattr(tokenizer.model, "ignore_merges", False)
    names = [name for name, row in PRE_TOKENIZERS.items() if _signature(row.make()) == mine]
    # Some split alike and merge differently.
    for name in sorted(names, key=lambda name: PRE_TOKENIZERS[name].ignore_merges != ignores):
        return name
    raise InputError(
        f"this tokenizer splits text in a way that GGUF export has no name for: it knows {', '.join(PRE_TOKENIZERS)}"
    )


def _signature(splitter: pre.PreTokenizer | None) -> str:
    """The state of a pre-tokenizer, without the settings that do not change tokens."""
    state = json.loads(splitter.__getstate__()) if splitter is not None else None
    steps = state["pretokenizers"] if state and state["type"] == "Sequence" else [state]
    plain = [{k: v for k, v in (step or {}).items() if k != "trim_offsets"} for step in steps]
    for step in plain:  # all that a pattern matches, where it matches everything
        if step.get("behavior") == "Removed" and step.get("invert"):
            step |= {"behavior": "Isolated", "invert": False}
    return json.dumps(plain, sort_keys=True)
