"""A transformers tokenizer from the vocabulary in a GGUF: byte-level BPE (`gpt2`) or SentencePiece BPE (`llama`)."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers import normalizers as norm
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from entrenar.core.errors import InputError
from entrenar.models.pre_tokenizers import by_name

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def tokenizer_from_metadata(metadata: dict[str, Any], source: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF, its special tokens and chat template included.

    Raises:
        InputError: a key is missing, or a kind of tokenizer or split that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens, source)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, source)
    else:
        raise InputError(f"{source} has the tokenizer kind {kind!r}: this version reads gpt2 (BPE) and llama (SPM)")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    for token, token_type in zip(tokens, types, strict=True):
        if token_type in (CONTROL, USER_DEFINED):
            special = token_type == CONTROL
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])
    return _wrap(backend, metadata, tokens)


def _byte_level(metadata: dict[str, Any], tokens: list[str], source: str) -> Tokenizer:
    split = by_name(metadata.get("tokenizer.ggml.pre", "default"), source)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=split.ignore_merges))
    backend.pre_tokenizer = split.make()
    backend.decoder = decoders.ByteLevel()
    if split.normalizer:
        backend.normalizer = split.normalizer()
    return backend


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], source: str) -> Tokenizer:
    """SentencePiece BPE as `tokenizers` has it since Llama 2: merges ranked by the score of what they make."""
    scores: list[float] | None = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise InputError(f"{source} has no score for every token of its SentencePiece vocabulary: export it again")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(
        BPE(vocab=vocab, merges=_ranked_merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = [norm.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = norm.Sequence([*space, norm.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _ranked_merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of every token into two tokens, best resulting token first."""
    merges = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _wrap(backend: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> PreTrainedTokenizerFast:
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            special[f"{name}_token"] = tokens[index]
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata["tokenizer.ggml.model"] == "llama")
    if adds_bos and "bos_token" in special:
        _prepend_bos(backend, special["bos_token"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, add_bos_token=adds_bos, **special
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped


def _prepend_bos(backend: Tokenizer, bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
