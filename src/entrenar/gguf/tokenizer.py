"""A transformers tokenizer from the vocabulary in a GGUF: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`).

Its tokens are those of llama.cpp on the same file.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers import normalizers as norm
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.gguf.pre_tokenizers import by_name
from entrenar.gguf.special_tokens import CONTROL, UNKNOWN, USER_DEFINED, SpecialTokens, special_tokens

_TEMPLATE = "tokenizer.chat_template"
# Blanks behind these do not belong to a special token of Phi-3, behind all others they do (llama.cpp, by model name).
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def tokenizer_for_rows(metadata: dict[str, Any], rows: int, source: str) -> PreTrainedTokenizerFast:
    """`tokenizer_from_metadata`, and InputError unless it has as many tokens as the embedding has rows."""
    tokenizer = tokenizer_from_metadata(metadata, source)
    if len(metadata["tokenizer.ggml.tokens"]) != rows:
        raise InputError(
            f"{source} has {len(metadata['tokenizer.ggml.tokens'])} tokens but {rows} embeddings: fetch it again"
        )
    return tokenizer


def tokenizer_from_metadata(metadata: dict[str, Any], source: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF, its special tokens and chat template included.

    Raises:
        InputError: a key is missing, or a kind of tokenizer or split that is not known; a vocabulary that contradicts
            itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{source} has the tokenizer kind {kind!r}: this version reads gpt2 (BPE) and llama (SPM)")
    special = special_tokens(metadata, source)
    make = _byte_level if kind == "gpt2" else _sentencepiece
    backend, adds_bos = make(metadata, special, source)
    phi3 = any(name in str(metadata.get("general.name")).lower() for name in ("phi-3", "phi3"))
    for token, token_type in zip(special.texts, special.types, strict=True):
        if token_type in (CONTROL, USER_DEFINED, UNKNOWN):
            strip = phi3 and token not in _PHI3_PLAIN
            added = AddedToken(token, special=token_type != USER_DEFINED, normalized=False, rstrip=strip)
            backend.add_tokens([added])
    return _wrap(backend, metadata, special, adds_bos, source)


def _byte_level(metadata: dict[str, Any], special: SpecialTokens, source: str) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre") or "default"
    split = by_name(name, source)
    vocab = {token: index for index, token in enumerate(special.texts)}
    merges = _merges(metadata, vocab, source)
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=split.ignore_merges))
    backend.pre_tokenizer = split.as_llama_cpp()
    backend.decoder = decoders.ByteLevel()
    return backend, split.adds_bos


def _merges(metadata: dict[str, Any], vocab: dict[str, int], source: str) -> list[tuple[str, str]]:
    """The merges in their order, without those that never happen.

    What a merge makes may be no token (its text was emptied, say). llama.cpp merges it all the same and then takes it
    apart into what are bytes of UTF-8: of two ASCII letters the two, of others nothing at all, which is refused.
    """
    said = metadata.get("tokenizer.ggml.merges")
    if not isinstance(said, list) or not all(isinstance(merge, str) for merge in said):
        raise InputError(f"{source} has no tokenizer.ggml.merges, which its kind of tokenizer needs: export it again")
    merges: dict[tuple[str, str], None] = {}
    for merge in said:
        cut = merge.find(" ", 1)
        if cut > 0:
            merges.setdefault((merge[:cut], merge[cut + 1 :]))
    made = {left + right for left, right in merges}
    happen = [pair for pair in merges if all(len(part) == 1 or part in made for part in pair)]
    parts = {part for pair in happen for part in pair}
    undone = {
        (left, right)
        for left, right in happen
        if left + right not in vocab and len(left + right) == 2 and (left + right).isascii()
    }
    happen = [pair for pair in happen if pair not in undone or "".join(pair) in parts]
    for left, right in happen:
        lost = next((text for text in (left + right, left, right) if text not in vocab), None)
        if lost is not None:
            raise InputError(
                f"{source}: the merge {left + ' ' + right!r} is of {lost!r}, which is none of its tokens: export it "
                "again"
            )
    return happen


def _sentencepiece(metadata: dict[str, Any], special: SpecialTokens, source: str) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE as `tokenizers` has it since Llama 2: merges ranked by the score of what they make."""
    scores = metadata.get("tokenizer.ggml.scores")
    tokens = special.texts
    numbers = isinstance(scores, list) and all(isinstance(score, int | float) for score in scores)
    if not isinstance(scores, list) or not numbers or len(scores) < len(tokens):
        raise InputError(f"{source} has no score for every token of its SentencePiece vocabulary: export it again")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[special.ids.get("unknown", 0)]
    backend = Tokenizer(
        BPE(vocab=vocab, merges=_ranked_merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = [norm.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = norm.Sequence([*space, norm.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend, True


def _ranked_merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of every token into two tokens, best resulting token first."""
    merges = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _wrap(
    backend: Tokenizer, metadata: dict[str, Any], special: SpecialTokens, adds_bos: bool, source: str
) -> PreTrainedTokenizerFast:
    """`adds_bos`: whether llama.cpp adds one where the file does not say."""
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and "bos" in special.ids
    adds_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in special.ids
    named: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = special.ids.get(key)
        # transformers would cut a token with a name out of every text, which llama.cpp does with special ones alone.
        if index is not None and special.types[index] in (CONTROL, USER_DEFINED, UNKNOWN):
            named[f"{name}_token"] = special.texts[index]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, add_bos_token=adds_bos and "bos_token" in named,
        add_eos_token=adds_eos and "eos_token" in named, **named,
    )  # fmt: skip
    if adds_bos or adds_eos:
        _add_ends(wrapped.backend_tokenizer, special, adds_bos, adds_eos)
    wrapped.chat_template = _chat_template(metadata, source)  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped


def _chat_template(metadata: dict[str, Any], source: str) -> str | dict[str, str] | None:
    """The file's one template; where it has others under names (`tool_use`), all by name, as transformers has them."""
    found = {
        key.removeprefix(_TEMPLATE).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    }
    for template in found.values():
        if not isinstance(template, str):
            raise InputError(f"{source} has a chat template that is no text: export it again")
    return found if found.keys() - {"default"} else found.get("default")


def _add_ends(backend: Tokenizer, special: SpecialTokens, bos: bool, eos: bool) -> None:
    """Let every text begin with the first token and end with the last."""
    ids = [special.ids[name] for name, adds in (("bos", bos), ("eos", eos)) if adds]
    first = f"{special.texts[special.ids['bos']]} " if bos else ""
    last = f" {special.texts[special.ids['eos']]}" if eos else ""
    backend.post_processor = TemplateProcessing(
        single=f"{first}$A{last}", pair=f"{first}$A{last} {first}$B{last}",
        special_tokens=[(special.texts[index], index) for index in dict.fromkeys(ids)],
    )  # fmt: skip
