"""How far the logits of a model are from those of llama.cpp on a file."""

from pathlib import Path

import numpy as np
import torch
from llama_cpp import Llama
from transformers import PreTrainedModel

# Relative to the largest logit, with keys and values in f32 there. f16 rounds weights, and in llama.cpp activations,
# which the large random weights amplify from layer to layer: measured 1e-3 to 3e-3 for two layers, 9e-3 for five.
F32, F16 = 2e-5, 2e-2
GELU = 2e-3  # llama.cpp looks it up in a table of f16


def relative_error(
    model: PreTrainedModel, path: Path, ids: list[int], context: int = 512, lora: Path | None = None
) -> float:
    """The largest difference of logits over every position, by the largest logit."""
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0]
    other = Llama(
        str(path), n_ctx=context, logits_all=True, verbose=False, type_k=0, type_v=0,
        lora_path=str(lora) if lora else None,
    )  # fmt: skip
    try:
        other.eval(ids)
        theirs = torch.tensor(np.array(other.scores[: len(ids)]))
    finally:
        other.close()
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def tokens(rows: int, count: int = 64) -> list[int]:
    return torch.randint(3, rows, (count,), generator=torch.Generator().manual_seed(0)).tolist()
