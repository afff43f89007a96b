"""Whether llama.cpp, which splits a text by what a GGUF says alone, makes the tokens of the tokenizer it was made of.

A GGUF has no place for a normalizer, for blanks that an added token swallows, or for a split without a name. So the
tokenizer and what is read back from the written keys are compared on texts in which each such thing would show.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError, listing
from entrenar.data.turn_end import turn_end_id
from entrenar.gguf.tokenizer import tokenizer_from_metadata
from entrenar.gguf.vocabulary import added_around, tokenizer_state

PROBES = (
    "Where's THE key? I'LL tell you'd 've: don't, DON'T",
    "3 33 333 3333 33333 12,345.67 1e10 ２３ ½ ² Ⅳ ①",
    "a  b   c    d\te\t\tf\n\ng\n \n\n\nh\r\ni\u00a0j\u3000k",
    "ends with blanks  ",
    "\n\nlines before and after\n",
    "Süden ÀÉÎõü ñandú Ångström ß Straße İstanbul ıi ΑΒΓ σς Привет ЁЖ",
    "日本語のテキスト 漢字ｶﾀｶﾅ ＦＵＬＬ 한국어 កាន់តែ हिन्दी العربية עברית ไทย",
    "🙂 😶‍🌫️ 👨‍👩‍👧 🦙🦙 ✅ 🇪🇸",
    "`` quoted '' \"so\" ‘or’ “so” … — – - ﬁ ﬂ ™ ℌ",
    "def area(w, h):\n    return w * h  # m²\n\tprint({'a': [1, 2]}, sep='_')",
    "snake_case camelCase SHOUTING https://a.b/c?d=e&f#g x+=1; // ======= ------- ~~~",
    "zero\u200bwidth \u00ad soft \ufeff mark \x00 \x07 \x7f control",
)
# What NFC joins, which llama.cpp's converter lets go: text is nearly always in NFC.
_DECOMPOSED = "e\u0301 n\u0303 A\u030a \u212b \u1100\u1161 \u0915\u093c"
_BLANK_FIRST = " starts with a blank"
_MOST_ADDED = 64

Say = Callable[[str], None]


def check_same_ids(tokenizer: PreTrainedTokenizerBase, keys: Mapping[str, Any], say: Say) -> None:
    """Compare the tokenizer with the keys written of it; `say` gets what only differs in rare texts.

    Raises:
        InputError: llama.cpp would make other tokens of a text.
    """
    back = tokenizer_from_metadata(dict(keys), "the GGUF")
    if keys["tokenizer.ggml.model"] == "gpt2":
        back.backend_tokenizer.normalizer = None  # llama.cpp's byte-level BPE has none, whatever the split
    state = tokenizer_state(tokenizer)
    for text in PROBES:
        _check(tokenizer, back, text, state)
    if _ids(tokenizer, _DECOMPOSED) != _ids(back, _DECOMPOSED):
        if _steps(state) - {"NFC"}:
            _refuse(_DECOMPOSED, tokenizer, back, state)
        say("text that is not in Unicode's composed form (NFC) is composed by this tokenizer and not by llama.cpp")
    if _metaspace(state) and _ids(tokenizer, _BLANK_FIRST) != _ids(back, _BLANK_FIRST):
        say("before a text that begins with a blank llama.cpp puts one more, and this tokenizer does not")
    else:
        _check(tokenizer, back, _BLANK_FIRST, state)
    _check_around(tokenizer)
    _check_added(tokenizer, back, state, say)


def _check(tokenizer: PreTrainedTokenizerBase, back: PreTrainedTokenizerBase, text: str, state: dict[str, Any]) -> None:
    if _ids(tokenizer, text) != _ids(back, text):
        _refuse(text, tokenizer, back, state)


def _refuse(
    text: str, tokenizer: PreTrainedTokenizerBase, back: PreTrainedTokenizerBase, state: dict[str, Any]
) -> None:
    """InputError with the shortest beginning of the text at which the two part."""
    end = next(n for n in range(1, len(text) + 1) if _ids(tokenizer, text[:n]) != _ids(back, text[:n]))
    part = text[:end]
    steps = sorted(_steps(state) - {"NFC"})
    cause = f"its normalizer ({listing(steps)}) has no place in a GGUF" if steps else "a GGUF cannot say how it splits"
    raise InputError(
        f"llama.cpp would not read text as this tokenizer does, for {cause}: of {part!r} it makes "
        f"{_ids(back, part)[-8:]} and the tokenizer {_ids(tokenizer, part)[-8:]}; export --to safetensors"
    )


def _check_around(tokenizer: PreTrainedTokenizerBase) -> None:
    before, after = added_around(tokenizer)
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        names = tokenizer.convert_ids_to_tokens([*before, *after])
        raise InputError(
            f"this tokenizer puts {listing(list(map(str, names)))} around every text, and a GGUF knows bos before and "
            "eos after it alone: export --to safetensors"
        )


def _check_added(
    tokenizer: PreTrainedTokenizerBase, back: PreTrainedTokenizerBase, state: dict[str, Any], say: Say
) -> None:
    """Added tokens in a text; what differs beside one is said, for llama.cpp's converter writes it so as well."""
    end = turn_end_id(tokenizer)
    added = sorted(state.get("added_tokens", []), key=lambda token: token["id"] != end)
    strips = [one["content"] for one in added if one["lstrip"] or one["rstrip"] or one["single_word"]]
    if strips:
        say(
            f"beside {listing(strips, 3)} this tokenizer takes blanks away or wants them, which llama.cpp does for few "
            "families only: look at the tokens of a chat there"
        )
    others = [one["content"] for one in added if one["content"] not in strips][:_MOST_ADDED]
    differing = [token for token in others if _ids(tokenizer, f"a{token}b") != _ids(back, f"a{token}b")]
    if differing:
        say(f"after {listing(differing, 3)} llama.cpp splits a text otherwise than this tokenizer")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore


def _metaspace(state: dict[str, Any]) -> bool:
    return (state.get("pre_tokenizer") or {}).get("type") == "Metaspace"


def _steps(state: dict[str, Any]) -> set[str]:
    """The names of a normalizer's steps; those that every GGUF's SentencePiece has are not counted."""
    normalizer = state.get("normalizer")
    steps = [normalizer] if normalizer else []
    if normalizer and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    everywhere = ({"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {_named(step) for step in steps if step not in everywhere}


def _named(step: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in step.items() if key != "type"}
    return f"{step['type']} {json.dumps(rest, ensure_ascii=False)[:60]}" if rest else str(step["type"])
