"""Text → token ids, by the stretches between added tokens, each made once.

A tokenizer takes an added token as it stands wherever it is, and makes the tokens of what lies between two of them from
that alone. A conversation's prompts and answers share most such stretches, so each is tokenized once, with the added
tokens around it (they may take white space from it). That it is so is tried: the first texts are tokenized as a whole
too, and a tokenizer that makes something else of one goes on with whole texts.
"""

import re
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

_TRIED = 64  # texts
_MOST = 4096  # stretches that are remembered


class _Stretches:
    """What is known of a tokenizer with `size` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = list(tokenizer.added_tokens_decoder.values())
        # A token that is looked for in normalized text, or only as a word of its own, does not part what is beside it.
        parting = {str(token) for token in added if token.special and not token.normalized and not token.single_word}
        overlapping = {part for part in parting for token in map(str, added) if part != token and part in token}
        longest_first = sorted(filter(None, parting - overlapping), key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self.size = len(tokenizer)
        self.left_to_try = _TRIED if tokenizer.is_fast and not overlapping else 0
        self.whole = not self.left_to_try or self.pattern is None
        self.known: dict[tuple[str, str, str], list[int]] = {}

    def of(self, text: str) -> list[tuple[str, str, str]]:
        """The stretches of a text, each between the added tokens around it."""
        assert self.pattern is not None
        parts = ["", *self.pattern.split(text), ""]
        return [(parts[i - 1], parts[i], parts[i + 1]) for i in range(1, len(parts), 2)]


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, _Stretches] = WeakKeyDictionary()


def tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text, without tokens that a tokenizer adds by itself."""
    return all_tokens([text], tokenizer)[0]


def all_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text."""
    known = _KNOWN.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _KNOWN[tokenizer] = _Stretches(tokenizer)
    if known.whole:
        return _whole(texts, tokenizer)
    ids = _by_stretches(texts, known, tokenizer)
    if known.left_to_try > 0:
        known.left_to_try -= len(texts)
        whole = _whole(texts, tokenizer)
        known.whole = whole != ids
        return whole
    return ids


def _by_stretches(texts: list[str], known: _Stretches, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    stretches = [known.of(text) for text in texts]
    if len(known.known) > _MOST:
        known.known.clear()
    new = list(dict.fromkeys(key for keys in stretches for key in keys if key not in known.known))
    for key, ids in zip(new, _whole(["".join(key) for key in new], tokenizer), strict=True):
        # The token before belongs to the stretch before.
        known.known[key] = ids[1:] if key[0] else ids
    return [[i for key in keys for i in known.known[key]] for keys in stretches]


def _whole(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    given = [text for text in texts if text]
    ids = iter(tokenizer(given, add_special_tokens=False, return_attention_mask=False)["input_ids"] if given else ())
    return [list(next(ids)) if text else [] for text in texts]
