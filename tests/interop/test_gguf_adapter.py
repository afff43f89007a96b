"""llama.cpp applies our GGUF adapter: its logits are those of our live model, on a float base and on the blocks."""

from pathlib import Path

import pytest
import torch

from entrenar.lora.adapter_io import save_adapter
from entrenar.lora.attach import adapted_layers, attach_lora
from entrenar.opening.load import load
from entrenar.recipes.export import export
from tests.support.llama_cpp_logits import TEXT, live_logits, mean_kl

pytestmark = pytest.mark.interop

TOKENS = 500


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
