"""Tiny tokenizers of every kind that GGUF holds, trained or built as the published ones are."""

import random
from collections.abc import Callable
from functools import partial

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from entrenar.gguf.pre_tokenizers import PRE_TOKENIZERS

_CORPUS = [
    "The quick brown fox isn't over 12345 lazy dogs?\n\nDON'T panic! (x = y_1 + 20.5) // ñandú 漢字 camelCase"
] * 3
_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_PIECES = [*_CORPUS[0].split(), *_SPECIAL, " ", "  ", "\n", "\n\n", "\t", "777", "'s", "é", "é", "漢字", "🙂", "<tool>"]
_CHARACTERS = [chr(point) for point in (*range(33, 127), *range(161, 0x2000), *range(0x3041, 0xA000))]


def random_text(source: random.Random) -> str:
    """Words, blanks, special tokens and any characters, none at the start that a space could be."""
    parts = source.choices([*_PIECES, *source.choices(_CHARACTERS, k=4)], k=source.randrange(1, 12))
    return source.choice("aT7ñ漢") + "".join(parts).replace("▁", "_")


def byte_level(split: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with one split of the table, an added token among its own."""
    row = PRE_TOKENIZERS[split]
    backend = Tokenizer(BPE(ignore_merges=row.ignore_merges))
    backend.pre_tokenizer, backend.decoder = row.make(), decoders.ByteLevel()
    if row.normalizer:
        backend.normalizer = row.normalizer()
    trainer = BpeTrainer(
        vocab_size=330, special_tokens=_SPECIAL, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return _wrap(backend, bos)


def sentencepiece(bos: bool, before: str) -> PreTrainedTokenizerFast:
    """SentencePiece as `tokenizers` has it: every split of every piece is a merge, ranked by the piece.

    `before`: what puts a space before the text: `prepend` (Llama 2, Phi-3), `metaspace` (Llama 2 as transformers
    builds it), or `nothing` (Gemma).
    """
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre.Metaspace(split=True)
    trained.train_from_iterator(_CORPUS, BpeTrainer(vocab_size=130, show_progress=False))
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(trained.get_vocab(), key=lambda token: (len(token), trained.token_to_id(token)))
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(tokens[261:], key=lambda token: -vocab[token] if before == "nothing" else vocab[token])
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if before == "metaspace":
        backend.pre_tokenizer = pre.Metaspace(prepend_scheme="always", split=False)
    else:
        first = [norm.Prepend("▁")] if before == "prepend" else []
        backend.normalizer = norm.Sequence([*first, norm.Replace(" ", "▁")])
    strip = [] if before == "nothing" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return _wrap(backend, bos)


def _wrap(backend: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if bos:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    **{split: partial(byte_level, split) for split in PRE_TOKENIZERS},
    "llama-bpe with a bos": partial(byte_level, "llama-bpe", bos=True),
    "llama 2": partial(sentencepiece, bos=True, before="prepend"),
    "llama 2 in transformers 5": partial(sentencepiece, bos=True, before="metaspace"),
    "phi-3": partial(sentencepiece, bos=False, before="prepend"),
    "gemma": partial(sentencepiece, bos=True, before="nothing"),
}
