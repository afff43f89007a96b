"""llama.cpp applies our GGUF adapter: its logits are those of our live model, on a float base and on the blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_cpp import Llama
from torch import Tensor

from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.opening.open_model import open_model
from entrenar.recipes.export import export

pytestmark = pytest.mark.interop

TOKENS = 500
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


@pytest.fixture(scope="module")
def ids(smollm2: Path) -> list[int]:
    _, tokenizer = load(str(smollm2), dtype="float32")
    found: list[int] = tokenizer(TEXT)["input_ids"][:TOKENS]  # pyright: ignore
    assert len(found) == TOKENS
    return found


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter over every linear layer that changes the model visibly."""
    model, _ = load(str(smollm2), dtype="float32")
    torch.manual_seed(0)
    attach_lora(model, rank=8, alpha=16)
    for _, layer in adapted_layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.06)
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, directory)
    return directory


def test_on_a_float_base_the_logits_are_ours(smollm2: Path, adapter: Path, ids: list[int], tmp_path: Path) -> None:
    base = export(str(smollm2), tmp_path / "f32.gguf", to="gguf", type="f32")
    lora = export(str(base), tmp_path / "lora.gguf", to="gguf-adapter", adapter=str(adapter))
    live = live_logits(str(base), str(adapter), ids)
    kl = mean_kl(live, base, lora, ids)
    print(f"KL on the f32 base: {kl:.2e}; without the adapter {mean_kl(live, base, None, ids):.2e}")  # noqa: T201
    assert kl <= 1e-4
    assert mean_kl(live, base, None, ids) > 0.05


def test_on_the_untouched_blocks_the_adapter_adds_no_error(
    smollm2: Path, adapter: Path, ids: list[int], tmp_path: Path
) -> None:
    """llama.cpp rounds activations to 8 bits for blocks, which alone costs what `bare` measures."""
    lora = export(str(smollm2), tmp_path / "lora.gguf", to="gguf-adapter", adapter=str(adapter))
    bare = mean_kl(live_logits(str(smollm2), None, ids), smollm2, None, ids)
    adapted = mean_kl(live_logits(str(smollm2), str(adapter), ids), smollm2, lora, ids)
    print(f"KL on the Q4_1 base: bare {bare:.2e}, with the adapter {adapted:.2e}")  # noqa: T201
    assert adapted <= 1.5 * bare
