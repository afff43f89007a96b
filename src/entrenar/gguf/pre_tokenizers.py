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


# What llama.cpp has for them: letters that are not a–z for uppercase, no marks. "ÉCOLE" is cut after its É.
_NOT_LOWER, _NOT_UPPER = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_ASCII_ENDING = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
_LLAMA_CPP_TEKKEN = rf"{_BEFORE}{_NOT_LOWER}*{_NOT_UPPER}+|{_BEFORE}{_NOT_LOWER}+{_NOT_UPPER}*|\p{{N}}{_REST}"
_LLAMA_CPP_O200K = (
    rf"{_BEFORE}{_NOT_LOWER}*{_NOT_UPPER}+{_ASCII_ENDING}|{_BEFORE}{_NOT_LOWER}+{_NOT_UPPER}*{_ASCII_ENDING}"
    rf"|\p{{N}}{{1,3}}{_REST}"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How one family splits text.

    Attributes:
        make: as its published tokenizers do, by which a tokenizer is recognised.
        in_llama_cpp: as llama.cpp does, where that is not the same.
        normalizer: of the published ones; llama.cpp has none.
        ignore_merges: a word in the vocabulary is one token whatever the merges say.
        adds_bos: llama.cpp puts the first token before a text where the file does not say.
    """

    make: Callable[[], pre.PreTokenizer]
    in_llama_cpp: Callable[[], pre.PreTokenizer] | None = None
    normalizer: Callable[[], norm.Normalizer] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False

    def as_llama_cpp(self) -> pre.PreTokenizer:
        """What cuts a text where llama.cpp cuts it."""
        return (self.in_llama_cpp or self.make)()


def _split_then_bytes(*patterns: str) -> pre.PreTokenizer:
    splits = [pre.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre.Sequence([*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(lambda: pre.ByteLevel(add_prefix_space=False, use_regex=True)),
    "smollm": PreTokenizer(
        lambda: pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    ),
    "llama-bpe": PreTokenizer(lambda: _split_then_bytes(_LLAMA3), ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(lambda: _split_then_bytes(_QWEN2), normalizer=norm.NFC),
    "dbrx": PreTokenizer(lambda: _split_then_bytes(_LLAMA3)),  # Phi-4
    "gpt-4o": PreTokenizer(  # Phi-4 mini
        lambda: _split_then_bytes(_O200K), in_llama_cpp=lambda: _split_then_bytes(_LLAMA_CPP_O200K)
    ),
    "tekken": PreTokenizer(  # Mistral NeMo
        lambda: _split_then_bytes(_TEKKEN), in_llama_cpp=lambda: _split_then_bytes(_LLAMA_CPP_TEKKEN),
        ignore_merges=True, adds_bos=True,
    ),
    "default": PreTokenizer(lambda: _split_then_bytes(*_DEFAULT)),  # files that do not say: nobody's but llama.cpp's
}  # fmt: skip
# Other names of the same split in llama.cpp, as far as they differ in nothing else.
_ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"), "qwen2"
    ),
    **dict.fromkeys(
        ("phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"),
        "gpt-2",
    ),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), "smollm"
    ),
    **dict.fromkeys(("llama4", "kanana2", "talkie", "minimax-m2"), "gpt-4o"),
    "smaug-bpe": "dbrx",
}  # fmt: skip


def by_name(name: str, source: str) -> PreTokenizer:
    """The row called `name` in a GGUF; InputError lists the known ones."""
    row = PRE_TOKENIZERS.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if row is None:
        raise InputError(
            f"{source} splits text by {name!r}, which this version does not know: {', '.join(PRE_TOKENIZERS)}"
        )
    return row


def name_of(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of a tokenizer's split; InputError when it is none of the table's."""
    mine, ignores = _signature(tokenizer.pre_tokenizer), getattr(tokenizer.model, "ignore_merges", False)
    names = [
        name for name, row in PRE_TOKENIZERS.items() if mine in (_signature(row.make()), _signature(row.as_llama_cpp()))
    ]
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
