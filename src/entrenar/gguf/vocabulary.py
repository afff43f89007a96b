"""A transformers tokenizer as GGUF metadata: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

As llama.cpp's convert_hf_to_gguf.py writes it; what that drops and would make other tokens of a text is found by
vocabulary_probe.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError, listing
from entrenar.data.turn_end import turn_end_id
from entrenar.gguf.pre_tokenizers import name_of
from entrenar.gguf.special_tokens import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds; `merges` for byte-level BPE, `scores` for SentencePiece.

    `chat_templates` by name: "default", and others such as "tool_use". `unmarked_ends`: tokens that end an answer and
    for which the file has no key left.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special_ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space_prefix: bool
    chat_templates: dict[str, str]
    unmarked_ends: list[str]


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary, padded with unused tokens to the `rows` of the embedding.

    Args:
        ends: ids that end an answer, by the model's generation config; those that the chat template ends a turn with
            are found here.

    Raises:
        InputError: a tokenizer that is not BPE, or whose split llama.cpp has no name for.
    """
    state = tokenizer_state(tokenizer)
    model = state["model"]
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= rows:
        raise InputError(f"the tokenizer has the token id {max(by_id)} but the model has only {rows} embeddings")
    sentencepiece = bool(model.get("byte_fallback"))
    special, unmarked = _special_ids(tokenizer, [index for index in ends if index in by_id])
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else name_of(tokenizer.backend_tokenizer),  # pyright: ignore
        tokens=[by_id.get(index, f"[PAD{index}]") for index in range(rows)],
        types=_types(state, by_id, rows, sentencepiece),
        merges=None if sentencepiece else [_merge_text(merge) for merge in model["merges"]],
        scores=_scores(model, by_id, rows) if sentencepiece else None,
        special_ids=special,
        adds_bos=added_around(tokenizer)[0] == [tokenizer.bos_token_id],
        adds_eos=added_around(tokenizer)[1] == [tokenizer.eos_token_id],
        adds_space_prefix=sentencepiece and _adds_space(state),
        chat_templates=_chat_templates(tokenizer),
        unmarked_ends=[by_id[index] for index in unmarked],
    )


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What its tokenizer.json says; InputError unless it is a BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    kind = state.get("model", {}).get("type")
    if kind != "BPE":
        raise InputError(f"GGUF export writes BPE tokenizers; this one is {kind or type(tokenizer).__name__}")
    return state


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text by itself."""
    plain: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: Any = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), 0)
    return whole[:start], whole[start + len(plain) :]


def _merge_text(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _scores(model: dict[str, Any], by_id: dict[int, str], rows: int) -> list[float]:
    """Ranks of merges for SentencePiece's scores: what is merged first is best; a token that no merge makes is last."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault(_merge_text(merge).replace(" ", ""), rank)
    return [-float(ranks.get(by_id.get(index, ""), len(model["merges"]))) for index in range(rows)]


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a space is put before the text: by the normalizer, or as transformers 5 builds Llama's tokenizer."""
    splitter = state.get("pre_tokenizer") or {}
    metaspace = splitter.get("type") == "Metaspace" and splitter.get("prepend_scheme") != "never"
    return metaspace or "Prepend" in json.dumps(state.get("normalizer"))


def _types(state: dict[str, Any], by_id: dict[int, str], rows: int, sentencepiece: bool) -> list[int]:
    types = [NORMAL if index in by_id else UNUSED for index in range(rows)]
    for added in state.get("added_tokens", []):
        is_control = added["special"] or _looks_special(added["content"])
        types[added["id"]] = CONTROL if is_control else USER_DEFINED
    if sentencepiece:
        for index, token in by_id.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[index] = BYTE
            elif token == state["model"].get("unk_token"):
                types[index] = UNKNOWN
    return types


def _looks_special(token: str) -> bool:
    """Whether an added token is a control token to llama.cpp's converter although it is not marked special."""
    around = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(start) and token.endswith(end) for start, end in around
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> tuple[dict[str, int], list[int]]:
    """The file's named ids, and the ends of an answer that got no name: beside eos there are eot and eom."""
    found: dict[str, Any] = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unknown": tokenizer.unk_token_id,
        "seperator": tokenizer.sep_token_id, "padding": tokenizer.pad_token_id, "cls": tokenizer.cls_token_id,
        "mask": tokenizer.mask_token_id,
    }  # fmt: skip
    special = {name: index for name, index in found.items() if isinstance(index, int)}
    turn_end = turn_end_id(tokenizer)
    wanted = dict.fromkeys([turn_end, *ends] if turn_end is not None else ends)
    others = [index for index in wanted if index != special.get("eos")]
    return special | dict(zip(("eot", "eom"), others, strict=False)), others[2:]


def _chat_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Name → template, named as the file can name them; InputError where two would have one name."""
    found: Any = tokenizer.chat_template
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    templates: dict[str, str] = {}
    pairs = found.items() if isinstance(found, Mapping) else ((one["name"], one["template"]) for one in found)
    for name, template in pairs:
        key = "".join(char if char.isascii() and char.isalnum() else "_" for char in name)
        if key in templates:
            raise InputError(f"the chat templates {listing(list(dict(found)))} would have one name in a GGUF: {key!r}")
        templates[key] = template
    return templates
