"""Calibrate an export: the importance of every weight's columns on a text of the user's."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entrenar.evaluation.importance import column_importance
from entrenar.recipes.text import read_text, text_rows

ROW, MAX_ROWS = 512, 128  # tokens of a row, as llama.cpp's imatrix has them; rows at most
_PURPOSE = "calibrate on"


@dataclass(frozen=True)
class Calibration:
    """Importance by transformers' parameter name, (columns,) float32; `text`: its file; `rows` it was measured on."""

    importance: dict[str, Tensor]
    text: str
    rows: int

    @property
    def keys(self) -> dict[str, str | int]:
        """What llama.cpp's quantizer says of an importance matrix in a GGUF."""
        prefix = "quantize.imatrix"
        return {
            f"{prefix}.file": "entrenar", f"{prefix}.dataset": self.text,
            f"{prefix}.entries_count": len(self.importance), f"{prefix}.chunks_count": self.rows,
        }  # fmt: skip


def calibrate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | Path) -> Calibration:
    """Run `model` over the first MAX_ROWS · ROW tokens of the file `text`.

    Raises:
        InputError: the text cannot be read, or is too short.
    """
    rows = text_rows(tokenizer, read_text(text, _PURPOSE), str(text), _PURPOSE, row=ROW, most=MAX_ROWS)
    return Calibration(column_importance(model, rows), Path(text).name, len(rows))
