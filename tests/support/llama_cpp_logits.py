"""How far the logits of a model are from those of llama.cpp on a file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from llama_cpp import Llama
from torch import Tensor
from transformers import PreTrainedModel

from entrenar.opening.adapted import open_model

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


TEXT = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")


@contextmanager
def llama_cpp(path: Path, lora: Path | None) -> Iterator[Llama]:
    model = Llama(str(path), n_ctx=512, logits_all=True, verbose=False, lora_path=str(lora) if lora else None)
    try:
        yield model
    finally:
        model.close()


def mean_kl(ours: Tensor, path: Path, lora: Path | None, ids: list[int]) -> float:
    """Mean KL(ours ‖ llama.cpp's) in nats a token; ours (T, V) logits."""
    with llama_cpp(path, lora) as other:
        other.eval(ids)
        theirs = torch.tensor(np.array(other.scores[: len(ids)])).log_softmax(-1)
    log_p = ours.log_softmax(-1)
    return (log_p.exp() * (log_p - theirs)).sum(-1).mean().item()


def live_logits(model: str, adapter: str | None, ids: list[int]) -> Tensor:
    loaded, _ = open_model(model, adapter, "keep", dtype="float32")
    with torch.no_grad():
        return loaded(input_ids=torch.tensor([ids])).logits[0]
