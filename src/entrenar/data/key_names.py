"""What the name of a column, or of a key of a turn, says: whether it bears on what is trained.

Files name it in many ways (`loss_weight`, `isMasked`, `do_train`), so names are read word by word. What a name leaves
open its value decides: a key of a turn that is true, false or a number switches something, unless its name says that
it only tells something about the turn.
"""

import re
from typing import Any

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_OF_TRAINING = """
    loss losses lossmask lossweight noloss train trains trained trainable training untrained notrain mask masks masked
    masking nomask unmask unmasked weight weights weighted weighting sampleweight label labels learn learned learnable
    nolearn unlearn ignore ignored skip skipped exclude excluded include included supervise supervised unsupervised
    reject rejected backprop backpropagate grad gradient
"""
_OF_TELLING = """
    id uid uuid idx index score rating reward rank vote likes probability logprob confidence similarity quality toxicity
    temperature seed time timestamp ts date day created updated duration latency second ms turn step round number num
    count token length len size position offset order sequence seq level depth parent child page line version year age
    cost price embedding
"""
_TRAINING, _TELLING = frozenset(_OF_TRAINING.split()), frozenset(_OF_TELLING.split())


def is_given(value: Any) -> bool:
    """Whether a value is there at all: null and empty texts, lists and objects are not."""
    return value is not None and value != "" and value != [] and value != {}


def says_what_is_trained(key: str) -> bool:
    """Whether a name speaks of loss, masks, weights or the like."""
    return not _TRAINING.isdisjoint(_words(key))


def switches(key: str, value: Any) -> bool:
    """Whether a key of a turn, by its value, may switch something: true, false, or a number (also a list of those)
    that is no id, score, time or place."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, bool | int | float) and switches(key, item) for item in value)
    if isinstance(value, bool):
        return True
    told = {word.removesuffix("s") for word in _words(key)} | set(_words(key))
    return isinstance(value, int | float) and _TELLING.isdisjoint(told)


def _words(key: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(key)]
