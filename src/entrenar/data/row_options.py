"""How the rows of a run are read and what of them is trained: the `data` section's keys that every reader needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TrainOn = Literal["all", "last", "marked"]


@dataclass(frozen=True)
class RowOptions:
    """`columns`: our name of a column → the file's. `train_on`: every answer, the last of each conversation, or those
    that are marked by `weight: 1` or `train: true`. `template`: variables for the chat template, which a row's own
    `chat_template_kwargs` go before.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    train_on: TrainOn = "all"
    template: Mapping[str, Any] = field(default_factory=dict)


AS_THEY_ARE = RowOptions()
