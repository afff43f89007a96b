"""Which tokens of a GGUF are special and which end an answer: what llama.cpp makes of their ids, types and texts.

A file names one end of sequence, but many end a turn with another token. llama.cpp finds such tokens by their texts and
takes them for control tokens whatever type the file gives them; so are they here, or a model that was trained to stop
would not stop. (llama-vocab.cpp, `llama_vocab::impl::load`, of llama-cpp-python 0.3.36; tests/interop asks it again.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from entrenar.core.errors import InputError

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# What is taken where a file names none.
_DEFAULT_IDS: dict[str, dict[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0}, "gpt2": {"bos": 11, "eos": 11},
}  # fmt: skip
_NAMES = ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep",
          "fim_sep")  # fmt: skip
_OLD_NAMES = {"prefix": "fim_pre", "suffix": "fim_suf", "middle": "fim_mid"}
# Each is looked for where the file names none; all of the first two are ends anyway.
_BY_TEXT = {
    "fim_pre": (
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}  # fmt: skip
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
_ALSO_ENDS = ("fim_pad", "fim_rep", "fim_sep", "eos", "eot", "eom")  # whatever their texts are
_HARMONY = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss shows them


@dataclass(frozen=True)
class SpecialTokens:
    """`texts` and `types` of every token; `ids` of those with a name (`bos`, …); `ends`, eos first."""

    texts: list[str]
    types: list[int]
    ids: dict[str, int]
    ends: list[int]


def special_tokens(metadata: Mapping[str, Any], source: str) -> SpecialTokens:
    """What llama.cpp makes of a vocabulary.

    Raises:
        InputError: no tokens, the same token twice, not a type for every token.
    """
    texts = _texts(metadata, source)
    types = _types(metadata, len(texts), source)
    index = {text: number for number, text in enumerate(texts)}
    ids = named_ids(metadata, len(texts))
    for name, known in _BY_TEXT.items():
        candidates = sorted(index[text] for text in known if text in index)
        if name not in ids and candidates:
            ids[name] = candidates[0]
            types[candidates[0]] = CONTROL
    ends = {index[text] for text in _ENDS if text in index}
    for end in ends:
        types[end] = CONTROL
    for text in _HARMONY:
        if text in index:
            types[index[text]] = USER_DEFINED
    ends |= {ids[name] for name in _ALSO_ENDS if name in ids}
    _except(ends, types, texts)
    return SpecialTokens(texts, types, ids, sorted(ends, key=lambda end: (end != ids.get("eos"), end)))


def generation_config(metadata: Mapping[str, Any], config: PretrainedConfig, source: str) -> GenerationConfig | None:
    """What llama.cpp stops at, as the generation config of a directory says it; None for a file without tokens."""
    if not metadata.get("tokenizer.ggml.tokens"):
        return None  # making the tokenizer says so
    known: Any = config
    return GenerationConfig(
        bos_token_id=known.bos_token_id, eos_token_id=special_tokens(metadata, source).ends,
        pad_token_id=known.pad_token_id,
    )  # fmt: skip


def _except(ends: set[int], types: list[int], texts: Sequence[str]) -> None:
    """Take out what looks like an end in a vocabulary where it is none."""
    by_text = {texts[end]: end for end in ends}
    have = by_text.keys()
    calls = bool(have & {"<|call|>", "<|calls|>"})
    if "<|end|>" in have and calls and have & {"<|return|>", "<|flush|>"}:  # gpt-oss, Solar: between parts of a turn
        ends.remove(by_text["<|end|>"])
        types[by_text["<|end|>"]] = USER_DEFINED
    if "</s>" in have and have & {"<|tool_response>", "<|plamo:eos|>"}:  # Gemma 4: a word
        ends.remove(by_text["</s>"])
        types[by_text["</s>"]] = NORMAL


def named_ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    """Name → id, of `count` tokens, for what a file names or llama.cpp takes for it; −1 and others beyond name none."""
    ids = dict(_DEFAULT_IDS.get(metadata.get("tokenizer.ggml.model", ""), {}))
    for name in (*_NAMES, *_OLD_NAMES):
        said = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(said) is int and 0 <= said < count:
            ids[_OLD_NAMES.get(name, name)] = said
    return {name: index for name, index in ids.items() if index < count}


def _texts(metadata: Mapping[str, Any], source: str) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"{source} has no tokenizer.ggml.tokens: a model without its tokenizer is not read")
    texts = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
    if len(set(texts)) < len(texts):
        first: dict[str, int] = {}
        number = next(number for number, text in enumerate(texts) if first.setdefault(text, number) != number)
        raise InputError(
            f"{source} has the token {texts[number]!r} twice, as {first[texts[number]]} and {number}, and which a text "
            "becomes is not said (llama.cpp stops at such a file): export it again"
        )
    return texts


def _types(metadata: Mapping[str, Any], count: int, source: str) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * count
    if not isinstance(types, list) or len(types) < count or not all(type(kind) is int for kind in types):
        known = len(types) if isinstance(types, list) else 0
        raise InputError(
            f"{source} has tokenizer.ggml.token_type for {known} of its {count} tokens, and llama.cpp refuses it too: "
            "export it again"
        )
    return types[:count]
