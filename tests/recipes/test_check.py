"""`check` predicts to the byte and trains nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerFast

from entrenar.data.batches import Batch
from entrenar.lora.attach import attach_lora
from entrenar.opening.load import load
from entrenar.recipes.check import check, histogram
from entrenar.recipes.train import train
from entrenar.training import step
from entrenar.training.learner import Learner
from entrenar.training.step import Means, accumulate

MakeConfig = Callable[..., Path]


@pytest.mark.parametrize("quantize", ["nf4", "int4", "int8", "none"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_sizes_are_those_of_the_loaded_model(
    make_config: MakeConfig, tiny_model_dir: Path, quantize: str, double_quant: bool
) -> None:
    report = check(make_config(**{"model.quantize": quantize, "model.double_quant": double_quant}))
    held = report.memory.fixed
    model, _ = load(str(tiny_model_dir), quantize, double_quant=double_quant, dtype="float32")
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    assert held.base == sum(storages.values())
    attach_lora(model, rank=4, alpha=8)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert report.trainable_parameters == sum(p.numel() for p in trained)
    assert held.adapter == held.gradients == sum(p.numel() * p.element_size() for p in trained)
    assert held.optimizer == sum(2 * p.numel() * 4 + 4 for p in trained)


def test_samples_show_the_answer_as_trained(make_config: MakeConfig, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    report = check(make_config())
    assert len(report.samples) == 3
    for pieces in report.samples:
        (trained,) = [text for text, is_trained in pieces if is_trained]
        assert trained.startswith('{"do"')
        assert trained.endswith("}<|im_end|>")


@pytest.mark.parametrize("packing", [True, False])
def test_padding_is_counted_as_training_will_make_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """Against the tensors of the whole run."""
    shapes: list[tuple[int, ...]] = []

    def noted(
        learner: Learner, batches: Sequence[Batch], parameters: Sequence[nn.Parameter], loss_scale: float
    ) -> Means:
        shapes.extend(tuple(batch.ids.shape) for batch in batches)
        return accumulate(learner, batches, parameters, loss_scale)

    config = make_config(**{"data.packing": packing, "data.max_length": 120})
    use = check(config).use
    monkeypatch.setattr(step, "accumulate", noted)
    result = train(config)
    assert use.batches == result.steps == 6
    assert use.tokens == result.tokens
    assert use.tokens + use.padding == sum(rows * length for rows, length in shapes)
    assert use.useful == use.tokens / (use.tokens + use.padding)


def test_nothing_is_written(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    before = sorted(tmp_path.iterdir())
    assert check(config).total_steps == 6
    assert sorted(tmp_path.iterdir()) == before


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_the_histogram_counts_every_row_once(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert sum(count for *_, count in bins) == len(lengths)
    assert all(start <= end for start, end, _ in bins)
    assert len(bins) <= 8
