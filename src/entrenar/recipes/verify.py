"""Verify an exported GGUF against the live model it was made of, step by step: live, fused, quantized."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.core.errors import EntrenarError
from entrenar.evaluation.fidelity import ExportStep, fidelity, fused, log_probabilities
from entrenar.opening.as_stored import AS_STORED
from entrenar.opening.load import load
from entrenar.recipes.text import read_text, token_ids

MAX_TOKENS = 512
_PURPOSE = "verify on"
# Measured on unless a file is named: ordinary prose that no model was tuned on.
TEXT = """The ferry left at ten past seven, later than the timetable said, for a tractor had to be lashed to the deck
with rope that nobody could find. Marta counted the passengers twice: thirty-one, if one did not include the dog, which
had no ticket but a great deal of confidence. Beyond the harbour wall the water turned from green to slate, and the
engine settled into the low note that she had known since she was a child. Somebody opened a flask of coffee. Somebody
else began to explain, at length and with drawings on the back of an envelope, why the bridge would never be built: the
tides were too strong, the rock was too soft, and the two parishes had not agreed on anything since 1911. "What would it
cost?" asked the boy with the bicycle. The man with the envelope thought about it. "Less than not building it," he said
at last, "but that is the kind of sum no council likes to add up." When the island came into view it looked, as always,
smaller than it was; only close to the shore did the houses separate from the hillside and the white shapes on the grass
turn out to be sheep. The ferry was late by now, and it did not matter. The post would be handed out on the quay, the
tractor would be driven off to scattered applause, and by noon the same boat would carry back eleven people, four crates
of eggs and a letter to the council, signed by everyone, asking once more about the bridge."""


def held_out(tokenizer: PreTrainedTokenizerBase, text: str | Path | None = None) -> Tensor:
    """The ids to verify on, (T,) int64: the first of a file of held-out text, or of a page of prose.

    Raises:
        InputError: the text cannot be read, or is too short to measure on.
    """
    content = TEXT if text is None else read_text(text, _PURPOSE)
    return token_ids(tokenizer, content, str(text), _PURPOSE, MAX_TOKENS)


def verify(
    live: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gguf: Path, text: str | Path | None = None
) -> list[ExportStep]:
    """The steps from `live`, in float32 and with its adapter, to the file `gguf`, on `held_out`'s ids.

    Raises:
        InputError: see `held_out`. EntrenarError: the file answers with numbers that are not finite.
    """
    ids = held_out(tokenizer, text)
    reference = log_probabilities(live, ids)
    steps = [fidelity("live", reference, reference, ids)]
    with fused(live):
        steps.append(fidelity("fused", reference, log_probabilities(live, ids), ids))
    written, _ = load(str(gguf), AS_STORED, dtype="float32")
    quantized = log_probabilities(written, ids)
    if reference.isfinite().all() and not quantized.isfinite().all():
        raise EntrenarError(
            "the written GGUF answers with a NaN or an infinity, so it was removed: choose another type"
        )
    return [*steps, fidelity("quantized", reference, quantized, ids)]
