"""A Llama that changes its logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel


class BentLlama(LlamaForCausalLM):
    """A Llama that does `bend` to its logits."""

    bend: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        assert output.logits is not None
        output.logits = self.bend(output.logits)
        return output


@pytest.fixture
def bent(tiny_model_dir: Path) -> Callable[[Callable[[Tensor], Tensor]], PreTrainedModel]:
    """The tiny Llama with a function behind its head."""

    def make(bend: Callable[[Tensor], Tensor]) -> PreTrainedModel:
        model = BentLlama.from_pretrained(tiny_model_dir)
        model.bend = bend
        return model

    return make
