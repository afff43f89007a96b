"""The output head taken out of a model's forward pass: what reaches it, and what the model does to its logits.

For one pass the head is replaced by a probe, known numbers in place of logits. The model's own forward then yields the
hidden states without a product over the vocabulary, and what it makes of the probe is what it makes of logits: scaling
and softcapping are read off whatever the architecture calls them, and anything else is noticed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from entrenar.core.errors import InputError
from entrenar.layers.linear_cross_entropy import LogitRule

_SMALL, _LARGE = 2.0**-10, 1e30  # where softcapping does nothing, and where it has reached its cap
_TOLERANCE = 1e-5  # of the probe's float32 arithmetic, relative


@dataclass(frozen=True)
class HeadInput:
    """What a model gave its head: hidden (B, C, H). `rule`: what it then does to logits; None: something unknown."""

    hidden: Tensor
    rule: LogitRule | None


def output_head(model: PreTrainedModel) -> nn.Module:
    """The layer that makes logits, plain or adapted."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)  # opening/load.py refuses a model without one
    return head


def vocabulary_size(model: PreTrainedModel) -> int:
    """Logits that the head makes."""
    return model.config.get_text_config().vocab_size


def refuse_foreign(ids: Sequence[int], model: PreTrainedModel, where: str) -> None:
    """InputError when one of a text's tokens has no row in the model; `where` the text is from."""
    size = vocabulary_size(model)
    if max(ids, default=0) >= size:
        raise InputError(
            f"{where}: the tokenizer makes token {max(ids)} of this text, and the model has {size} tokens: the "
            "tokenizer is not this model's, put the model's own beside it"
        )


def padding_id(model: PreTrainedModel, *wanted: Any) -> int:
    """The first of the `wanted` tokens that the model has, else 0: which, does not matter, as padding is masked."""
    size = vocabulary_size(model)
    return next((index for index in wanted if isinstance(index, int) and 0 <= index < size), 0)


def head_input(model: PreTrainedModel, **inputs: Any) -> HeadInput | None:
    """Run `model` on `inputs` up to its head; None if it does not call the head exactly once."""
    seen: list[Tensor] = []
    probe = _probe(vocabulary_size(model), model.device)

    def stand_in(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return probe.clone()  # a model may change its logits in place

    with _forward_replaced(output_head(model), stand_in):
        logits = model(**inputs).logits
    return HeadInput(seen[0], _read_rule(probe, logits)) if len(seen) == 1 else None


def own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (n, V) of hidden states (n, H) through the model's own forward; a pass over one token stands around it."""
    head = output_head(model)
    forward = head.forward
    with _forward_replaced(head, lambda _: forward(hidden)[None]):
        return model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False).logits[0]


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `forward` stand for the module's own; hooks on the module still run around it."""
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward") if before is None else attributes.update(forward=before)


def _probe(vocabulary: int, device: torch.device) -> Tensor:
    """(1, 1, V) float32: one small, one huge, and values from −8000 to 8000, dense around 0."""
    probe = torch.linspace(-20, 20, vocabulary, device=device) ** 3
    probe[:2] = torch.tensor([_SMALL, _LARGE])
    return probe[None, None]


def _read_rule(probe: Tensor, logits: Tensor) -> LogitRule | None:
    """The rule that makes `logits` of `probe`, or None if none does, or if a trained parameter takes part."""
    if logits.shape != probe.shape or logits.requires_grad:
        return None
    small, large = logits[0, 0, :2].tolist()
    softcap = large if abs(large) < math.sqrt(_LARGE) else None
    if softcap is None:
        scale = small / _SMALL
    elif abs(small) < softcap:
        scale = math.atanh(small / softcap) * softcap / _SMALL
    else:
        return None
    rule = LogitRule(1.0 if abs(scale - 1) < _TOLERANCE else scale, softcap)
    return rule if torch.allclose(logits.float(), rule(probe), rtol=_TOLERANCE, atol=0) else None
