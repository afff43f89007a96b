"""A transformers tokenizer as GGUF metadata: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`)."""

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from entrenar.core.errors import InputError
from entrenar.models.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from entrenar.models.pre_tokenizers import name_of


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What `tokenizer.ggml.*` holds; `merges` for byte-level BPE, `scores` for SentencePiece."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special_ids: dict[str, int]
    adds_bos: bool
    adds_space_prefix: bool
    chat_template: str | None


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary, padded with unused tokens to the `rows` of the embedding.

    Raises:
        InputError: a tokenizer that is not BPE, or whose split llama.cpp has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = state.get("model", {})
    if backend is None or model.get("type") != "BPE":
        raise InputError(
            f"GGUF export writes BPE tokenizers; this one is {model.get('type') or type(tokenizer).__name__}"
        )
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= rows:
        raise InputError(f"the tokenizer has the token id {max(by_id)} but the model has only {rows} embeddings")
    sentencepiece = bool(model.get("byte_fallback"))
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else name_of(backend),
        tokens=[by_id.get(index, f"[PAD{index}]") for index in range(rows)],
        types=_types(state, by_id, rows, sentencepiece),
        merges=None if sentencepiece else [_merge_text(merge) for merge in model["merges"]],
        scores=_scores(model, by_id, rows) if sentencepiece else None,
        special_ids=_special_ids(tokenizer),
        adds_bos=_adds_bos(tokenizer),
        adds_space_prefix=sentencepiece and _adds_space(state),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


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
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if sentencepiece:
        for index, token in by_id.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[index] = BYTE
            elif token == state["model"].get("unk_token"):
                types[index] = UNKNOWN
    return types


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    found = {
        "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id,
    }  # fmt: skip
    return {name: index for name, index in found.items() if isinstance(index, int)}


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: Any = tokenizer("a", return_attention_mask=False)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
